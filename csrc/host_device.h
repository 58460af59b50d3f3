// Marks what the CPU and the CUDA kernels share: the root search and the ordered keys.
#pragma once

#ifdef __CUDACC__
#define SPARTAN_HD __host__ __device__
#else
#define SPARTAN_HD
#endif
