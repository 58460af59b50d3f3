#include "global_solve.h"
#include "row_solver.h"

namespace spartan::cpu {
namespace {

template <class T>
void global_forward(Dtype dtype, Table table, double budget, double beta, bool absolute, double* state, double* threshold,
                    Workspace workspace, int threads, const Group& group) {
  Arena arena(workspace);
  Problem<T> problem(dtype, table, absolute, false, threads, group, arena);
  GlobalSolve<T> solve(&problem, budget, beta, reinterpret_cast<SolverState*>(state));
  if (problem.length() > 0) solve.run();
  save<T>(solve.search(), threshold);
}

template <class T>
void global_backward(Dtype dtype, Table table, const double* threshold, double beta, double* scalars, Workspace workspace,
                     int threads, const Group& group) {
  Arena arena(workspace);
  Problem<T> problem(dtype, table, false, true, threads, group, arena);
  const Logit<T> logit = saved_logit<T>(threshold, beta);
  const GradientSums sums = problem.gradient_sums(logit);
  // a budget of nothing or everything saturates every entry; their logistic is cut off a little above zero
  const double r = sums.as > 0 && std::isfinite(threshold[1]) ? sums.gs / sums.as : 0.0;
  problem.write_gradient(logit, static_cast<T>(r));
  scalars[0] = r;
  scalars[1] = sums.gsu - r * sums.asu;
}

}  // namespace

void soft_topk_global(Dtype dtype, Table table, double budget, double beta, bool absolute, double* state,
                      double* threshold, Workspace workspace, int threads, const Group& group) {
  SPARTAN_DISPATCH(global_forward<T>(dtype, table, budget, beta, absolute, state, threshold, workspace, threads, group))
}

void soft_topk_global_backward(Dtype dtype, Table table, const double* threshold, double beta, double* scalars,
                               Workspace workspace, int threads, const Group& group) {
  SPARTAN_DISPATCH(global_backward<T>(dtype, table, threshold, beta, scalars, workspace, threads, group))
}

int64_t rows_workspace_bytes(int64_t length, int element_size, int threads) {
  if (!piece_fits_cache(length, element_size)) return workspace_bytes(1, length, std::max(element_size, 4));
  return piece_bytes(length, element_size) * std::max(threads, 1);
}

void soft_topk_rows(Dtype dtype, Rows rows, RowBudgets budget, double beta, void* mask, double* threshold,
                    Workspace workspace, int threads) {
  advise_fresh(dtype, rows, mask);
  SPARTAN_DISPATCH_STORAGE(for_rows<S>(rows, workspace, threads, [&](const RowSolver<S>& solver, int64_t first, int64_t last) {
    solver.soft(first, last, budget, beta, static_cast<S*>(mask), threshold);
  }))
}

void soft_topk_rows_backward(Dtype dtype, Rows rows, const void* grad, double beta, RowGradient gradient, void* grad_values,
                             void* grad_costs, Workspace workspace, int threads) {
  advise_fresh(dtype, rows, grad_values);
  if (grad_costs != nullptr) advise_fresh(dtype, rows, grad_costs);
  SPARTAN_DISPATCH_STORAGE(for_rows<S>(rows, workspace, threads, [&](const RowSolver<S>& solver, int64_t first, int64_t last) {
    solver.soft_backward(first, last, static_cast<const S*>(grad), beta, gradient, static_cast<S*>(grad_values),
                         static_cast<S*>(grad_costs));
  }))
}

}  // namespace spartan::cpu
