#include "global_solve.h"
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

}  // namespace spartan::cpu
