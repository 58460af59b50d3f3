// Every entry point of the extension, over raw pointers. No PyTorch header is included anywhere below this file.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

namespace spartan {

// tf32: float32 whose products the tensor cores may take of numbers rounded to 10 bits; of CUDA's products alone.
enum class Dtype : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3, tf32 = 4 };

// Values are refused. Of a list also those of -inf: its caller leaves them out and calls again; of rows only long ones.
struct NotFinite : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// Scratch memory of the caller. The extension allocates none.
struct Workspace {
  void* data;
  int64_t bytes;
};

// The ranks that solve together. gather(context, mine, bytes) returns what all of them passed, in their order, which stays
// valid until the next call; all ranks call it equally often with the same number of bytes.
struct Group {
  int rank = 0, size = 1;
  const void* (*gather)(void* context, const void* mine, int64_t bytes) = nullptr;
  void* context = nullptr;
};

// One tensor of a list: contiguous values, their costs (null: `cost` each), and what to write or read beside them.
struct TableRow {
  const void* values;
  const void* costs;
  double cost;
  int64_t length;
  void* extra[3];
};

struct Table {
  const TableRow* rows;
  int64_t count;
};

namespace cpu {

// "avx512", "avx2" or "baseline": what the kernels run on here. SPARTAN_ISA can name a lower one.
const char* instruction_set();
bool parallel_available();

int64_t workspace_bytes(int64_t parts, int64_t length, int element_size, bool grouped = false);
int64_t rows_workspace_bytes(int64_t length, int element_size, int threads);

// One budget over a list. extra = {soft mask or null, hard mask or null}, not both null. `state` (8 doubles, see
// new_solver_state) or null to start cold. threshold = {centre, shift}.
void soft_topk_global(Dtype, Table, double budget, double beta, bool absolute, double* state, double* threshold,
                      Workspace, int threads, const Group& = {});
// extra = {gradient of the mask, gradient of values, gradient of costs or null}. scalars = {of budget, of beta}.
void soft_topk_global_backward(Dtype, Table, const double* threshold, double beta, double* scalars, Workspace,
                               int threads, const Group& = {});
// extra = {hard mask}.
void hard_topk_global(Dtype, Table, double budget, bool absolute, Workspace, int threads, const Group& = {});

// The same by rows of [rows, length], `stride` from row to row; costs null (`cost` each), or at `cost_stride`. Every element
// type; masks and gradients are contiguous.
struct Rows {
  const void* values;
  const void* costs;
  double cost;
  int64_t rows, length, stride, cost_stride;
};
struct RowBudgets {
  const double* first;
  int64_t stride;       // 0: the rows share one
  bool capped = false;  // hard_topk_rows alone: a budget above what a row's entries cost keeps them all, and is no error
};
struct RowGradient {
  const double* threshold;  // {centre, shift} of each row
  double* budget;
  double* beta;
};
void soft_topk_rows(Dtype, Rows, RowBudgets, double beta, void* mask, double* threshold, Workspace, int threads);
void soft_topk_rows_backward(Dtype, Rows, const void* grad, double beta, RowGradient, void* grad_values, void* grad_costs,
                             Workspace, int threads);
void hard_topk_rows(Dtype, Rows, RowBudgets, uint8_t* mask, Workspace, int threads);
// k entries of each row: its mask, and their indices [rows, k], ascending. A row with fewer that are not masked has some of the
// first masked ones among its indices.
void hard_topk_indices_rows(Dtype, Rows, int64_t k, uint8_t* mask, int64_t* indices, Workspace, int threads);

// A weight [out, in, kernel], contiguous, in blocks of rows x columns for each kernel position; masks, scores and costs have
// one entry per block, [ceil(out / rows), ceil(in / columns), kernel]. Null soft or hard: ones; null costs: `cost` each.
struct Blocks {
  int64_t out, in, kernel, rows, columns;
};
struct BlockCosts {
  const void* array;
  double cost;
};
// What m is made of: its values, null for ones, or {centre, shift} of the solution sigmoid(beta (|theta| / a - centre) + shift),
// on the CPU where each weight is a block.
struct SoftMask {
  const void* values;
  const double* solution;
  double beta;
  BlockCosts costs;
};
void masked_weight(Dtype, Blocks, const void* weight, SoftMask, const uint8_t* hard, void* result, int threads);
void masked_weight_backward(Dtype, Blocks, const void* grad, const void* weight, SoftMask, const uint8_t* hard,
                            bool straight_through, void* result, Workspace, int threads);
void masked_weight_coupling(Dtype, Blocks, const void* grad, const void* weight, SoftMask, double* sums, Workspace,
                            int threads);
void masked_weight_correct(Dtype, Blocks, void* grad, const void* weight, SoftMask, double scale, int threads);
// sums = {sum h m, sum h}, where each weight is a block
void masked_weight_kept(Dtype, Blocks, const void* weight, SoftMask, const uint8_t* hard, double* sums, Workspace,
                        int threads);
// Through a gate of each block of more than one weight, in place: sums_b = sum of grad theta, grad <- grad gate_b +
// sign(theta) slope_b sums_b; a null slope is 0.
void gate_gradient(Dtype, Blocks, void* grad, const void* weight, const void* gate, const void* slope, void* sums,
                   Workspace, int threads);
// grad += sign(weight) * pull, one pull per block
void add_block_signs(Dtype, Blocks, void* grad, const void* weight, const void* pull, int threads);
void block_scores(Dtype, Blocks, const void* weight, void* scores, int threads);
int64_t blocks_workspace_bytes(Blocks);

// Products with a matrix [out, in] in blocks of rows x columns, of which those of the layout take part. `data` is the whole
// matrix (`stride` from row to row), or with `positions` the active blocks alone, `stored` of them, in the order of the rows
// of blocks; positions says where the blocks of a column of blocks lie. Arithmetic is float32; gates are float32, null: ones.
enum class Activation : int { none, relu, gelu, gelu_tanh, silu };
struct Layout {
  const int32_t *row_offsets, *column_indices, *column_offsets, *row_indices, *order;
};
struct BlockMatrix {
  const void* data;
  int64_t out, in, rows, columns, stride;
  const float* gate;
  Layout layout;
  const int32_t* positions;
  int64_t stored;
};
// [tokens, in or out], each token contiguous, `stride` from one to the next.
struct Tokens {
  const void* data;
  int64_t count, stride;
};
// A layout that is written.
struct LayoutIndex {
  int32_t *row_offsets, *column_indices, *column_offsets, *row_indices, *order;
};
// Which blocks take part: those where the gate is not zero (NaN is not) and the mask is set, unless that is null.
struct ActiveGates {
  const void* gate;
  int gate_bytes;
  const uint8_t* mask;
  int64_t grid_rows, grid_columns;
};
// First the offsets of the rows, whose last entry is returned: as many blocks are active.
int64_t block_layout_rows(const ActiveGates&, int32_t* row_offsets, int threads);
// Then the rest. Entries past the count are set to 0 up to `capacity`. Null column_offsets: the rows alone; null order: none,
// else the rows from the longest to the shortest, then the columns. `scratch` holds as many numbers as is said.
int64_t block_layout_scratch(int64_t grid_rows, int64_t grid_columns, int threads);
void block_layout(const ActiveGates&, const LayoutIndex&, int64_t capacity, int32_t* scratch, int threads);
// Multiplies and adds in registers alone on every thread, for the peak that products are told by: returns the floating-point
// operations of all of them. Thread i writes sinks[i].
int64_t multiply_adds(int64_t rounds, float* sinks, int threads);
// Asked for before each product: it throws where the index that the product reads does not lie within the matrix.
int64_t masked_matmul_workspace_bytes(const BlockMatrix&, int64_t tokens, bool input_gradient, int threads);
// y = act(z), z = x w^T + bias, contiguous [tokens, out]; z is written to `saved` unless that is null.
void masked_matmul(Dtype, const BlockMatrix&, Tokens x, const void* bias, Activation, void* y, void* saved, Workspace,
                   int threads);
// dx = dz w, contiguous [tokens, in].
void masked_matmul_input_gradient(Dtype, const BlockMatrix&, Tokens dz, void* dx, Workspace, int threads);
// raw = dz^T x on the blocks of the layout (all of them: null offsets), zero elsewhere: float32 [out, in], or packed blocks
// where the matrix is. Then grad_gate_b = <raw_b, data_b> (unless null) and raw *= gate. Rows of x may overlap.
int64_t sampled_matmul_workspace_bytes(const BlockMatrix&, int64_t tokens, int64_t x_stride);
void sampled_matmul(Dtype, const BlockMatrix&, Tokens dz, Tokens x, float* raw, float* grad_gate, Workspace, int threads);

}  // namespace cpu

// On the current stream of one device: nothing here waits for the GPU or allocates. float32, bfloat16, float16; sums in
// float64. Every pointer, scalars included, is to device memory.
namespace cuda {

// Why the CUDA runtime cannot work here, or null.
const char* problem();

struct Stream {
  void* handle;
  int device;
};

// Sizes and geometry of a weight in blocks are the CPU's.
using cpu::Blocks;

struct Masks {
  const void* soft;
  const uint8_t* hard;
};
// One cost per block in the weight's type, or one number: exactly one pointer is not null.
struct BlockCosts {
  const void* array;
  const double* number;
};
void masked_weight(Dtype, Blocks, const void* weight, Masks, void* result, Stream);
void masked_weight_backward(Dtype, Blocks, const void* grad, const void* weight, Masks, const double* beta, BlockCosts,
                            bool straight_through, void* result, Stream);
// `workspace` holds kCouplingPartials doubles.
constexpr int64_t kCouplingPartials = 2 * 1024;
void masked_weight_coupling(Dtype, Blocks, const void* grad, const void* weight, const void* soft, const double* beta,
                            BlockCosts, double* sums, double* workspace, Stream);
void masked_weight_correct(Dtype, Blocks, void* grad, const void* weight, const void* soft, const double* scale, Stream);
void block_scores(Dtype, Blocks, const void* weight, void* scores, Stream);

// Products with a matrix in blocks, described as for the CPU; positions are of its packed blocks by columns. A workspace of the
// bytes asked for, where that is not none, lets few tokens use the whole device.
using cpu::Activation;
using cpu::BlockMatrix;
using cpu::Tokens;
// `counts` holds grid_rows + grid_columns numbers of scratch.
void block_layout(const void* gate, int gate_bytes, const uint8_t* mask, int64_t grid_rows, int64_t grid_columns,
                  int32_t* counts, int32_t* row_offsets, int32_t* column_indices, int32_t* column_offsets,
                  int32_t* row_indices, int32_t* order, Stream);
int64_t masked_matmul_workspace_bytes(Dtype, const BlockMatrix&, int64_t tokens);
void masked_matmul(Dtype, const BlockMatrix&, Tokens x, const void* bias, Activation, void* y, void* saved, void* workspace,
                   Stream);
void masked_matmul_input_gradient(Dtype, const BlockMatrix&, Tokens dz, void* dx, void* workspace, Stream);
// The active blocks of dz^T x, times their gate, in the matrix's type: [out, in] whose other blocks are left alone, or packed
// blocks. grad_gate_b = <(dz^T x)_b, data_b> there, unless null.
void sampled_matmul(Dtype, const BlockMatrix&, Tokens dz, Tokens x, void* result, float* grad_gate, Stream);
// The same of every block from a dense dz^T x: raw [out, in], contiguous, is multiplied by the gates in place.
void gate_gradient(Dtype, const BlockMatrix&, void* raw, float* grad_gate, Stream);

// A [rows, length] whose rows are contiguous and `stride` apart; what is written is contiguous. The cost of entry i of a row is costs[row * cost_stride + i * cost_step], null: 1.
struct Rows {
  const void* values;
  const void* costs;
  int64_t rows, length, stride, cost_stride, cost_step;
};
void soft_topk_rows(Dtype, Rows, const double* budget, const double* beta, void* mask, double* threshold, Stream);
void soft_topk_rows_backward(Dtype, Rows, const void* grad, const double* threshold, const double* beta, void* grad_values,
                             void* grad_costs, double* grad_budget, double* grad_beta, Stream);
void hard_topk_rows(Dtype, Rows, const double* budget, uint8_t* mask, Stream);

// One contiguous tensor of a list that shares a budget, the cost of its entry i being costs[i * cost_step], null: 1; and
// what to write or read beside it. A table lies in host memory: it is sent by value with the launches.
struct TableRow {
  const void* values;
  const void* costs;
  int64_t cost_step, length;
  void* extra[3];
};
struct Table {
  const TableRow* rows;
  int64_t count;
};
int64_t global_workspace_bytes(Table);
// extra = {soft mask or null, hard mask or null}. `state` is new_solver_state() or null; `threshold` {centre, shift} or null.
void topk_global(Dtype, Table, const double* budget, const double* beta, bool absolute, double* state, double* threshold,
                 void* workspace, Stream);
// extra = {gradient of the mask, gradient of values, gradient of costs or null}. scalars = {of budget, of beta}.
void soft_topk_global_backward(Dtype, Table, const double* threshold, const double* beta, double* scalars, void* workspace,
                               Stream);


// One launch of a call over a list as it would be made: bytes read and written for each entry in one pass over them, and how
// many such passes it makes when it starts cold and when it continues from its state, the data being neither flat nor sparse.
struct LaunchNote {
  const char* kernel;
  int read, written, cold, warm;
};
std::vector<LaunchNote> topk_global_launches(Dtype, bool soft, bool hard, bool cost_arrays);
std::vector<LaunchNote> soft_topk_global_backward_launches(Dtype, bool cost_arrays, bool cost_grad);

}  // namespace cuda
}  // namespace spartan
