// Soft and hard top-k by rows: each thread takes whole rows, and a long row is solved as a list of one tensor.
#include <atomic>
#include <exception>

#include "dispatch.h"
#include "problem.h"

namespace spartan::cpu {
namespace {

// One row as a list of one tensor.
TableRow row_of(const Rows& rows, int64_t row, int element_size) {
  const char* values = static_cast<const char*>(rows.values) + row * rows.length * element_size;
  const char* costs = static_cast<const char*>(rows.costs);
  if (costs != nullptr) costs += row * rows.cost_stride * element_size;
  return {values, costs, rows.cost, rows.length, {nullptr, nullptr, nullptr}};
}

int element_size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : 4; }

// Many rows: each thread takes whole rows. Few or long ones: all threads share each.
bool share_rows(const Rows& rows, int threads) { return rows.rows < threads || rows.length > (1 << 20); }

// Calls f(row, its workspace, threads for it); the first error of any row is thrown after the loop.
template <class F>
void for_rows(const Rows& rows, int element_size, Workspace workspace, int threads, F&& f) {
  if (share_rows(rows, threads)) {
    for (int64_t row = 0; row < rows.rows; ++row) f(row, workspace, threads);
    return;
  }
  const int64_t worth = rows.rows * rows.length / kMinChunk + 1;  // a thread costs more than a little work
  threads = static_cast<int>(std::min<int64_t>(threads, worth));
  const int64_t piece = cpu::workspace_bytes(1, rows.length, element_size);
  std::exception_ptr error;
  std::atomic<bool> failed{false};
  parallel_for(threads, threads, [&](int64_t worker) {
    Workspace own{static_cast<char*>(workspace.data) + worker * piece, piece};
    for (int64_t row = rows.rows * worker / threads; row < rows.rows * (worker + 1) / threads; ++row) {
      try {
        f(row, own, 1);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
        return;
      }
    }
  });
  if (error) std::rethrow_exception(error);
}

void* offset(void* data, int64_t bytes) { return data != nullptr ? static_cast<char*>(data) + bytes : nullptr; }

}  // namespace

int64_t rows_workspace_bytes(int64_t rows, int64_t length, int element_size, int threads) {
  const int64_t one = workspace_bytes(1, length, element_size);
  return share_rows({nullptr, nullptr, 1, rows, length, 0}, threads) ? one : one * threads;
}

void soft_topk_rows(Dtype dtype, Rows rows, const double* budget, double beta, void* mask, double* threshold,
                    Workspace workspace, int threads) {
  const int size = element_size_of(dtype);
  for_rows(rows, size, workspace, threads, [&](int64_t row, Workspace own, int team) {
    TableRow entry = row_of(rows, row, size);
    entry.extra[0] = offset(mask, row * rows.length * size);
    soft_topk_global(dtype, {&entry, 1}, budget[row], beta, false, nullptr, threshold + 2 * row, own, team);
  });
}

void soft_topk_rows_backward(Dtype dtype, Rows rows, const void* grad, const double* threshold, double beta,
                             void* grad_values, void* grad_costs, double* grad_budget, double* grad_beta,
                             Workspace workspace, int threads) {
  const int size = element_size_of(dtype);
  for_rows(rows, size, workspace, threads, [&](int64_t row, Workspace own, int team) {
    TableRow entry = row_of(rows, row, size);
    const int64_t at = row * rows.length * size;
    entry.extra[0] = offset(const_cast<void*>(grad), at);
    entry.extra[1] = offset(grad_values, at);
    entry.extra[2] = offset(grad_costs, at);
    double scalars[2];
    soft_topk_global_backward(dtype, {&entry, 1}, threshold + 2 * row, beta, scalars, own, team);
    grad_budget[row] = scalars[0];
    grad_beta[row] = scalars[1];
  });
}

void hard_topk_rows(Dtype dtype, Rows rows, const double* budget, uint8_t* mask, Workspace workspace, int threads) {
  const int size = element_size_of(dtype);
  for_rows(rows, size, workspace, threads, [&](int64_t row, Workspace own, int team) {
    TableRow entry = row_of(rows, row, size);
    entry.extra[0] = mask + row * rows.length;
    hard_topk_global(dtype, {&entry, 1}, budget[row], false, own, team);
  });
}

}  // namespace spartan::cpu
