// Marks what the CPU and the CUDA kernels share: the root search and the ordered keys.
#pragma once

#ifdef __CUDACC__
#define SPARTAN_HD __host__ __device__
#define SPARTAN_HD_CALLED SPARTAN_HD __noinline__  // rare: it shall not take registers of its caller
#else
#define SPARTAN_HD
#define SPARTAN_HD_CALLED
#endif
