#include "global_solve.h"
#include "mask_indices.h"
#include "row_solver.h"

namespace spartan::cpu {
namespace {

template <class T>
void global_hard(Dtype dtype, Table table, double budget, bool absolute, Workspace workspace, int threads,
                 const Group& group) {
  Arena arena(workspace);
  Problem<T> problem(dtype, table, absolute, false, threads, group, arena);
  GlobalSolve<T> solve(&problem, budget, 0.0, nullptr);
  if (problem.length() > 0) solve.run_hard();
}

}  // namespace

void hard_topk_global(Dtype dtype, Table table, double budget, bool absolute, Workspace workspace, int threads,
                      const Group& group) {
  SPARTAN_DISPATCH(global_hard<T>(dtype, table, budget, absolute, workspace, threads, group))
}

void hard_topk_rows(Dtype dtype, Rows rows, RowBudgets budget, uint8_t* mask, Workspace workspace, int threads) {
  advise_huge_pages(mask, rows.rows * rows.length);
  SPARTAN_DISPATCH_STORAGE(for_rows<S>(rows, workspace, threads, [&](const RowSolver<S>& solver, int64_t first, int64_t last) {
    solver.hard(first, last, budget, mask);
  }))
}

void hard_topk_indices_rows(Dtype dtype, Rows rows, int64_t k, uint8_t* mask, int64_t* indices, Workspace workspace,
                            int threads) {
  const double budget = static_cast<double>(k);
  advise_huge_pages(mask, rows.rows * rows.length);
  advise_huge_pages(indices, rows.rows * k * static_cast<int64_t>(sizeof(int64_t)));
  SPARTAN_DISPATCH_STORAGE(for_rows<S>(rows, workspace, threads, [&](const RowSolver<S>& solver, int64_t first, int64_t last) {
    solver.hard(first, last, {&budget, 0, true}, mask);
    for (int64_t row = first; row < last; ++row)
      row_indices(static_cast<const S*>(rows.values) + row * rows.stride, mask + row * rows.length, rows.length, k, indices + row * k);
  }))
}

}  // namespace spartan::cpu
