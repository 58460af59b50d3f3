// The CPU kernels against sums in float64, without Python: to be cross-compiled and run in an emulator. Prints what is wrong.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/ops.h"

using namespace spartan;

namespace {

std::mt19937 generator(std::random_device{}());
int wrong = 0, checks = 0;

void expect(bool right, const std::string& what) {
  ++checks;
  if (right) return;
  ++wrong;
  std::printf("wrong: %s\n", what.c_str());
}

std::vector<float> normal(int64_t count) {
  std::normal_distribution<float> draw;
  std::vector<float> values(count);
  for (float& v : values) v = draw(generator);
  return values;
}

struct Scratch {
  std::vector<double> memory;
  explicit Scratch(int64_t bytes) : memory(bytes / 8 + 16) {}
  Workspace space() { return {memory.data(), static_cast<int64_t>(memory.size() * 8)}; }
};

// The soft mask by bisection of its threshold.
std::vector<double> soft_mask(const float* values, int64_t n, double budget, double beta, bool absolute) {
  double low = -1e4, high = 1e4;
  std::vector<double> mask(n);
  for (int trial = 0; trial < 200; ++trial) {
    const double t = (low + high) / 2;
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double v = absolute ? std::fabs(values[i]) : values[i];
      sum += mask[i] = 1 / (1 + std::exp(-beta * (v - t)));
    }
    (sum > budget ? low : high) = t;
  }
  return mask;
}

double furthest(const float* found, const std::vector<double>& exact) {
  double most = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    if (std::isnan(found[i])) return INFINITY;
    most = std::fmax(most, std::fabs(found[i] - exact[i]));
  }
  return most;
}

void check_rows(int64_t rows, int64_t length, double share, double beta) {
  const std::vector<float> values = normal(rows * length);
  std::vector<float> mask(rows * length, NAN);
  std::vector<double> threshold(2 * rows);
  std::vector<uint8_t> hard(rows * length, 77);
  const double budget = share * static_cast<double>(length), whole = std::floor(budget);
  const cpu::Rows table{values.data(), nullptr, 1.0, rows, length, length, 0};
  Scratch scratch(cpu::rows_workspace_bytes(length, 4, 1));
  cpu::soft_topk_rows(Dtype::float32, table, {&budget, 0}, beta, mask.data(), threshold.data(), scratch.space(), 1);
  cpu::hard_topk_rows(Dtype::float32, table, {&whole, 0}, hard.data(), scratch.space(), 1);
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = values.data() + r * length;
    const std::string where = "row of " + std::to_string(length) + ", share " + std::to_string(share);
    expect(furthest(mask.data() + r * length, soft_mask(row, length, budget, beta, false)) < 2e-5, "soft mask, " + where);
    std::vector<float> sorted(row, row + length);
    std::sort(sorted.begin(), sorted.end(), std::greater<float>());
    bool same = true;
    for (int64_t i = 0; i < length; ++i) {
      const bool kept = whole >= 1 && row[i] >= sorted[static_cast<size_t>(whole) - 1];
      same = same && hard[r * length + i] == kept;
    }
    expect(same, "hard mask, " + where);
  }
}

void check_list(std::vector<int64_t> lengths, double share, double beta) {
  int64_t total = 0;
  for (const int64_t length : lengths) total += length;
  const std::vector<float> values = normal(total);
  std::vector<float> soft(total, NAN);
  std::vector<uint8_t> hard(total, 77);
  std::vector<TableRow> rows;
  for (int64_t i = 0, at = 0; i < static_cast<int64_t>(lengths.size()); at += lengths[i++])
    rows.push_back({values.data() + at, nullptr, 1.0, lengths[i], {soft.data() + at, hard.data() + at, nullptr}});
  const double budget = share * static_cast<double>(total);
  double state[8] = {}, threshold[2];
  Scratch scratch(cpu::workspace_bytes(static_cast<int64_t>(rows.size()), total, 4));
  const std::vector<double> exact = soft_mask(values.data(), total, budget, beta, true);
  for (const char* start : {"cold", "warm"}) {
    std::fill(soft.begin(), soft.end(), NAN);
    cpu::soft_topk_global(Dtype::float32, {rows.data(), static_cast<int64_t>(rows.size())}, budget, beta, true, state, threshold,
                          scratch.space(), 1);
    expect(furthest(soft.data(), exact) < 2e-5, std::string("soft masks of a list, ") + start);
    expect(std::count(hard.begin(), hard.end(), 1) == static_cast<int64_t>(budget), std::string("hard masks of a list, ") + start);
  }
}

void check_products(int64_t rows, int64_t columns, int64_t tokens) {
  const int64_t out = 67, in = 93, down = (out + rows - 1) / rows, across = (in + columns - 1) / columns;
  const std::vector<float> weight = normal(out * in), x = normal(tokens * in), dz = normal(tokens * out), bias = normal(out);
  std::vector<float> gate(down * across);
  for (float& g : gate) g = generator() % 4 == 0 ? 1.5f : 0.0f;
  std::vector<int32_t> row_offsets(down + 1), column_offsets(across + 1), order(down + across),
      scratch(cpu::block_layout_scratch(down, across, 1) + 1);
  const cpu::ActiveGates active{gate.data(), 4, nullptr, down, across};
  const int64_t count = cpu::block_layout_rows(active, row_offsets.data(), 1);
  std::vector<int32_t> column_indices(count + 1), row_indices(count + 1);
  cpu::block_layout(active, {row_offsets.data(), column_indices.data(), column_offsets.data(), row_indices.data(), order.data()},
                    count, scratch.data(), 1);
  const cpu::BlockMatrix matrix{weight.data(), out, in, rows, columns, in, gate.data(),
                                {row_offsets.data(), column_indices.data(), column_offsets.data(), row_indices.data(), order.data()},
                                nullptr, 0};
  std::vector<float> y(tokens * out, NAN), dx(tokens * in, NAN), raw(out * in, NAN);
  Scratch forward(cpu::masked_matmul_workspace_bytes(matrix, tokens, false, 1)),
      backward(cpu::masked_matmul_workspace_bytes(matrix, tokens, true, 1)),
      sampled(cpu::sampled_matmul_workspace_bytes(matrix, tokens, in));
  cpu::masked_matmul(Dtype::float32, matrix, {x.data(), tokens, in}, bias.data(), cpu::Activation::gelu, y.data(), nullptr,
                     forward.space(), 1);
  cpu::masked_matmul_input_gradient(Dtype::float32, matrix, {dz.data(), tokens, out}, dx.data(), backward.space(), 1);
  cpu::sampled_matmul(Dtype::float32, matrix, {dz.data(), tokens, out}, {x.data(), tokens, in}, raw.data(), nullptr,
                      sampled.space(), 1);
  const auto gate_at = [&](int64_t i, int64_t j) { return static_cast<double>(gate[i / rows * across + j / columns]); };
  std::vector<double> exact_y(tokens * out), exact_dx(tokens * in), exact_raw(out * in);
  for (int64_t i = 0; i < out; ++i)
    for (int64_t j = 0; j < in; ++j)
      for (int64_t t = 0; t < tokens; ++t) {
        const double w = gate_at(i, j) * weight[i * in + j];
        exact_y[t * out + i] += w * x[t * in + j];
        exact_dx[t * in + j] += w * dz[t * out + i];
        exact_raw[i * in + j] += gate_at(i, j) * dz[t * out + i] * x[t * in + j];
      }
  for (int64_t at = 0; at < tokens * out; ++at) {
    const double z = exact_y[at] + bias[at % out];
    exact_y[at] = z * std::erfc(-z / std::sqrt(2.0)) / 2;
  }
  const std::string where =
      "blocks of " + std::to_string(rows) + " x " + std::to_string(columns) + ", " + std::to_string(tokens) + " tokens";
  expect(furthest(y.data(), exact_y) < 1e-4, "product, " + where);
  expect(furthest(dx.data(), exact_dx) < 1e-4, "input gradient, " + where);
  expect(furthest(raw.data(), exact_raw) < 1e-4 * std::sqrt(static_cast<double>(tokens)), "weight gradient, " + where);
}

}  // namespace

int main() {
  for (const int64_t length : {1, 4, 7, 64, 100, 5000})
    for (const double share : {0.1, 0.5, 0.9}) check_rows(9, length, share, 5.0);
  check_list({100000, 1, 33333, 50000}, 0.1, 8.0);
  const int64_t blocks[][2] = {{1, 1}, {2, 1}, {4, 1}, {8, 1}, {16, 1}, {1, 16}, {8, 8}, {16, 16}, {32, 32}, {5, 7}};
  for (const auto& block : blocks)
    for (const int64_t tokens : {1, 5, 70}) check_products(block[0], block[1], tokens);
  std::printf("%s: %d checks, %d wrong\n", cpu::instruction_set(), checks, wrong);
  return wrong == 0 ? 0 : 1;
}
