// The CPU twins without torch: each against its formula in double, on rows that end at a guarded
// edge, with the instruction set that HELIOS_CPU_ISA names. Under the sanitizers this is what reads
// and writes out of bounds would fail.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../kernels/attention_parts.h"
#include "../kernels/isa.h"
#include "../kernels/latents.h"
#include "../kernels/patchify.h"
#include "../kernels/qk_rmsnorm_rope.h"
#include "../kernels/quantize.h"
#include "../kernels/quantize_heads.h"
#include "../kernels/residual_gate_norm.h"
#include "../kernels/vae.h"

namespace {

using namespace helios;

int num_failures = 0;

void check(bool holds, const char* what) {
  if (holds) return;
  std::printf("FAILED: %s\n", what);
  ++num_failures;
}

std::vector<float> random_floats(std::size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(generator);
  return values;
}

bool near(double actual, double expected, double tolerance = 1e-5) {
  return std::abs(actual - expected) <= tolerance * (1.0 + std::abs(expected));
}

Rows rows_of(std::vector<float>& x, std::int64_t rows, std::int64_t width) {
  return {x.data(), rows * width, width};
}

void test_residual_gate_norm(std::int64_t width) {
  const std::int64_t batch = 2, rows = 3;
  std::vector<float> x = random_floats(batch * rows * width, 1), before = x;
  std::vector<float> y = random_floats(x.size(), 2), out(x.size());
  const std::vector<float> gate = random_floats(2 * width, 3), weight = random_floats(2 * width, 4);
  const std::vector<float> bias = random_floats(2 * width, 5);
  ResidualGateNorm args{};
  args.x = rows_of(x, rows, width), args.y = rows_of(y, rows, width),
  args.out = rows_of(out, rows, width);
  args.gate = gate.data(), args.weight = weight.data(), args.bias = bias.data();
  args.gate_stride = args.weight_stride = args.bias_stride = width;
  args.batch = batch, args.rows = rows, args.width = width, args.num_history = 1, args.eps = 1e-6f;
  residual_gate_norm_cpu(args);
  for (std::int64_t r = 0; r < batch * rows; ++r) {
    const std::int64_t segment = r % rows < 1 ? 0 : 1;
    double mean = 0, variance = 0;
    for (std::int64_t i = 0; i < width; ++i) {
      const double expected =
          before[r * width + i] + static_cast<double>(y[r * width + i]) * gate[segment * width + i];
      check(near(x[r * width + i], expected), "residual");
      mean += x[r * width + i];
    }
    mean /= width;
    for (std::int64_t i = 0; i < width; ++i)
      variance += (x[r * width + i] - mean) * (x[r * width + i] - mean);
    variance /= width;
    for (std::int64_t i = 0; i < width && width > 1; ++i) {
      const double normed = (x[r * width + i] - mean) / std::sqrt(variance + 1e-6);
      check(near(out[r * width + i],
                 normed * weight[segment * width + i] + bias[segment * width + i], 1e-4),
            "norm");
    }
  }
}

void test_qk_rmsnorm_rope(std::int64_t heads, std::int64_t head_dim) {
  const std::int64_t rows = 4, width = heads * head_dim;
  const std::vector<float> original = random_floats(rows * 3 * width, 1);
  std::vector<float> qkv = original;
  const std::vector<float> weight = random_floats(width, 2),
                           angles = random_floats(rows * head_dim / 2, 3);
  const std::vector<float> scale = random_floats(heads, 4);
  std::vector<float> rotation;
  for (float angle : angles)
    rotation.push_back(std::cos(angle)), rotation.push_back(std::sin(angle));
  QkRmsnormRope args{};
  args.qkv = {qkv.data(), rows * 3 * width, 3 * width};
  args.q_weight = args.k_weight = weight.data(), args.rotation = rotation.data(),
  args.history_scale = scale.data();
  args.batch = 1, args.rows = rows, args.width = width, args.head_dim = head_dim,
  args.num_history = 2;
  args.first_query = 1, args.eps = 1e-6f;
  qk_rmsnorm_rope_cpu(args);
  for (std::int64_t row = 0; row < rows; ++row) {
    for (std::int64_t part = 0; part < 3; ++part) {
      const float* from = original.data() + (row * 3 + part) * width;
      const float* to = qkv.data() + (row * 3 + part) * width;
      if (part == 2 || (part == 0 && row < 1)) {
        check(std::memcmp(from, to, width * sizeof(float)) == 0, "values and skipped queries stay");
        continue;
      }
      double squares = 0;
      for (std::int64_t i = 0; i < width; ++i) squares += static_cast<double>(from[i]) * from[i];
      const double factor = 1.0 / std::sqrt(squares / width + 1e-6);
      for (std::int64_t i = 0; i < width; i += 2) {
        const double even = from[i] * factor * weight[i],
                     odd = from[i + 1] * factor * weight[i + 1];
        const double angle = angles[row * head_dim / 2 + i % head_dim / 2];
        const double amplify = part == 1 && row < 2 ? scale[i / head_dim] : 1.0;
        check(near(to[i], (even * std::cos(angle) - odd * std::sin(angle)) * amplify, 1e-4),
              "even");
        check(near(to[i + 1], (even * std::sin(angle) + odd * std::cos(angle)) * amplify, 1e-4),
              "odd");
      }
    }
  }
  // Packed and unpacked again it must be what it was in place.
  std::vector<float> source = original,
                     packed(original.size(), std::numeric_limits<float>::quiet_NaN());
  const std::int64_t shares[] = {heads / 2, heads - heads / 2};
  args.qkv.data = source.data(), args.packed = packed.data(), args.first_query = 0;
  args.heads_per_destination = shares, args.num_destinations = 2;
  qk_rmsnorm_rope_cpu(args);
  for (float value : packed) check(!std::isnan(value), "every element is packed");
}

void test_unpack_and_merge() {
  const std::int64_t batch = 2, rows = 3, head_dim = 5, heads[] = {2, 0, 1};
  std::vector<float> received(batch * rows * 3 * head_dim), out(received.size());
  for (std::size_t i = 0; i < received.size(); ++i) received[i] = static_cast<float>(i);
  unpack_heads_cpu({received.data(), out.data(), heads, 3, batch, rows, head_dim, sizeof(float)});
  check(out[0] == 0.0f && out[2 * head_dim] == static_cast<float>(batch * rows * 2 * head_dim),
        "unpacked heads");

  const float minus_infinity = -std::numeric_limits<float>::infinity();
  std::vector<float> first = {1, 2, 3, 4, 0, 0}, lse = {0.5f, 2.0f, minus_infinity};
  const std::vector<float> second = {5, 6, 7, 8, 9, 10},
                           other = {1.5f, minus_infinity, minus_infinity};
  merge_partials_cpu(
      {first.data(), lse.data(), second.data(), other.data(), 3, 2, DType::kFloat32});
  const double weight = 1.0 / (1.0 + std::exp(1.0));
  check(near(first[0], weight * 1 + (1 - weight) * 5), "merged");
  check(near(lse[0], std::log(std::exp(0.5) + std::exp(1.5))), "merged lse");
  check(first[2] == 3.0f && first[4] == 0.0f && lse[2] == minus_infinity, "nothing merged");
}

void test_patches_and_steps() {
  const std::int64_t channels = 3, frames = 3, height = 5, width = 7;
  std::vector<float> latents = random_floats(channels * frames * height * width, 1);
  const std::int64_t tokens = 2 * 3 * 4, length = channels * 2 * 2 * 2;
  std::vector<float> rows(tokens * length);
  PatchGather gather{};
  gather.latents = {
      latents.data(),
      {channels * frames * height * width, frames * height * width, height * width, width, 1}};
  gather.rows = rows.data(), gather.batch = 1, gather.channels = channels, gather.num_rows = tokens;
  gather.size[0] = frames, gather.size[1] = height, gather.size[2] = width;
  gather.kernel[0] = gather.kernel[1] = gather.kernel[2] = 2;
  patch_gather_cpu(gather);
  check(rows[0] == latents[0], "first element");
  check(rows[tokens * length - 1] == latents[latents.size() - 1], "edges are repeated");

  const std::int64_t grid = 2 * 4 * 6;
  std::vector<float> x = random_floats(channels * grid, 2),
                     velocity = random_floats(channels * grid, 3), next = x;
  const double deltas[] = {9.0, -0.25};
  const std::int64_t second = 1;
  SolverStep step{};
  step.rule = SolverStep::Rule::kEuler, step.coefficients = deltas, step.index = &second;
  step.latents = next.data(), step.velocity = velocity.data();
  step.batch = 1, step.channels = channels, step.size[0] = 2, step.size[1] = 4, step.size[2] = 6;
  step.patch[0] = 1, step.patch[1] = step.patch[2] = 2;
  solver_step_cpu(step);
  // Channel 1, frame 1, row 3, column 2: token (1, 1, 1), place (1, 0).
  const std::int64_t token = (1 * 2 + 1) * 3 + 1, index = ((1 * 2 + 1) * 4 + 3) * 6 + 2;
  check(near(next[index], x[index] - 0.25 * velocity[(token * 4 + 2) * channels + 1]),
        "velocity of a latent");
}

void test_latents() {
  const std::vector<float> x = {1, 2}, draws = {1, 0, 0, 0, 0, 1, 0, 0};
  std::vector<float> factor(16, 0.0f), out(8);
  for (int place = 0; place < 4; ++place) factor[4 * place] = static_cast<float>(place + 1);
  UpsampleRenoise up{};
  up.x = x.data(), up.draws = draws.data(), up.factor = factor.data(), up.out = out.data();
  up.planes = 1, up.rows = 1, up.columns = 2, up.alpha = 2.0f, up.beta = 10.0f;
  upsample_renoise_cpu(up);
  const std::vector<float> expected = {12, 22, 4, 4, 32, 42, 4, 4};
  check(out == expected, "upsampled with block noise");

  const std::vector<float> positive = random_floats(1000, 1);
  std::vector<float> guided(1000), negative = positive;
  std::vector<double> workspace(kCfgBlocks * 2);
  for (float& value : negative) value *= 3.0f;
  CfgCombine combine{};
  combine.positive = positive.data(), combine.negative = negative.data(),
  combine.out = guided.data();
  combine.workspace = workspace.data(), combine.batch = 1, combine.count = 1000,
  combine.scale = 7.0f, combine.zero_star = true;
  cfg_combine_cpu(combine);
  for (int i = 0; i < 1000; ++i)
    check(near(guided[i], positive[i]), "a parallel branch is projected onto the other");
}

void test_pictures(std::int64_t channels) {
  const std::int64_t frames = 2, height = 3, width = 2, pixels = frames * height * width;
  std::vector<float> x = random_floats(pixels * channels, 1), out(x.size()),
                     gamma = random_floats(channels, 2);
  const Pictures in = {x.data(),
                       {pixels * channels, height * width * channels, width * channels, channels}};
  Pictures to = in;
  to.data = out.data();
  channel_norm_silu_cpu(
      {in, to, gamma.data(), {}, 1, frames, height, width, channels, true, DType::kFloat32});
  for (std::int64_t pixel = 0; pixel < pixels; ++pixel) {
    double squares = 0;
    for (std::int64_t c = 0; c < channels; ++c)
      squares += static_cast<double>(x[pixel * channels + c]) * x[pixel * channels + c];
    for (std::int64_t c = 0; c < channels; ++c) {
      const double value =
          x[pixel * channels + c] / std::sqrt(squares) * std::sqrt(channels) * gamma[c];
      check(near(out[pixel * channels + c], value / (1 + std::exp(-value))), "norm and silu");
    }
  }
  std::vector<float> large(4 * x.size());
  const Pictures big = {
      large.data(),
      {4 * pixels * channels, 4 * height * width * channels, 2 * width * channels, channels}};
  upsample_nearest_cpu({in, big, {}, 1, frames, height, width, channels, DType::kFloat32});
  check(large[0] == x[0] && large[channels] == x[0], "repeated pixels");
  check(large[large.size() - 1] == x[x.size() - 1], "last pixel");
  std::vector<float> sum = x;
  Pictures sums = in;
  sums.data = sum.data();
  const Addends both = {gamma.data(), in};
  bias_residual_cpu({in, sums, both, 1, frames, height, width, channels, DType::kFloat32});
  for (std::int64_t i = 0; i < pixels * channels; ++i)
    check(near(sum[i], 2.0 * x[i] + gamma[i % channels]), "bias and residual");
  upsample_nearest_cpu({in, big, both, 1, frames, height, width, channels, DType::kFloat32});
  check(large[channels] == sum[0] && large[large.size() - 1] == sum[sum.size() - 1],
        "repeated sums");
  // The norm of a sum is that of the sum made before; with a residual x becomes the sum.
  std::vector<float> own = x, joined(x.size());
  Pictures mutated = in, into = in, other = in;
  mutated.data = own.data(), into.data = joined.data();
  channel_norm_silu_cpu({mutated,
                         into,
                         gamma.data(),
                         {gamma.data(), other},
                         1,
                         frames,
                         height,
                         width,
                         channels,
                         true,
                         DType::kFloat32});
  channel_norm_silu_cpu(
      {sums, to, gamma.data(), {}, 1, frames, height, width, channels, true, DType::kFloat32});
  for (std::int64_t i = 0; i < pixels * channels; ++i) {
    check(own[i] == sum[i], "x becomes the sum");
    check(near(joined[i], out[i]), "norm of a sum");
  }
}

void test_norm_in_eight_bits(std::int64_t width) {
  const std::int64_t rows = 4;
  std::vector<float> x = random_floats(rows * width, 1), h(x.size()), scale(rows), expected(rows);
  const std::vector<float> weight = random_floats(2 * width, 2), bias = random_floats(2 * width, 3);
  std::vector<std::uint8_t> out(x.size()), rounded(x.size());
  ResidualGateNorm args{};
  args.x = rows_of(x, rows, width), args.out = rows_of(h, rows, width);
  args.weight = weight.data(), args.bias = bias.data();
  args.weight_stride = args.bias_stride = width;
  args.batch = 1, args.rows = rows, args.width = width, args.num_history = 1;
  args.eps = 1e-6f, args.dtype = DType::kFloat32;
  residual_gate_norm_cpu(args);
  quantize_rows_cpu({rows_of(h, rows, width), rounded.data(), expected.data(), 1, rows, width,
                     false, DType::kFloat32});
  args.out = {out.data(), rows * width, width}, args.scale = {scale.data(), rows, 1};
  residual_gate_norm_cpu(args);
  // Lanes and single elements may round their sums otherwise by the last bit.
  for (std::int64_t r = 0; r < rows; ++r) check(near(scale[r], expected[r]), "scale of a norm");
  std::int64_t others = 0;
  for (std::size_t i = 0; i < out.size(); ++i) others += out[i] != rounded[i];
  check(others * 100 <= static_cast<std::int64_t>(out.size()), "a norm in 8 bits");
}

void test_quantize(std::int64_t width) {
  const std::int64_t rows = 3;
  std::vector<float> x = random_floats(rows * width, 1), scale(rows);
  std::vector<std::uint8_t> out(x.size());
  quantize_rows_cpu(
      {rows_of(x, rows, width), out.data(), scale.data(), 1, rows, width, false, DType::kFloat32});
  for (std::int64_t i = 0; i < rows * width; ++i) {
    const int exponent = out[i] >> 3 & 15, mantissa = out[i] & 7;
    const double size =
        exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
    const double value = (out[i] & 0x80 ? -size : size) * scale[i / width];
    const double step = std::ldexp(1.0, exponent == 0 ? -9 : exponent - 10) * scale[i / width];
    check(std::abs(value - x[i]) <= 0.501 * step, "the nearest 8-bit number");
  }
}

void test_quantize_heads(std::int64_t head_dim) {
  const std::int64_t rows = 5, heads = 3, width = heads * head_dim;
  std::vector<float> x = random_floats(rows * 3 * width, 1), scale(3 * heads);
  std::vector<float> workspace(3 * heads * kHeadParts);
  std::vector<std::uint8_t> out(3 * rows * width);
  QuantizeHeads args{};
  for (int part = 0; part < 3; ++part) {
    args.parts[part] = {{x.data() + part * width, rows * 3 * width, 3 * width},
                        out.data() + part * rows * width,
                        scale.data() + part * heads,
                        rows - part};
  }
  args.workspace = workspace.data(), args.batch = 1, args.heads = heads;
  args.head_dim = head_dim, args.dtype = DType::kFloat32;
  quantize_heads_cpu(args);
  for (int part = 0; part < 3; ++part) {
    for (std::int64_t head = 0; head < heads; ++head) {
      float top = 0;
      for (std::int64_t i = 0; i < (rows - part) * head_dim; ++i)
        top = std::max(
            top,
            std::abs(x[i / head_dim * 3 * width + part * width + head * head_dim + i % head_dim]));
      check(near(scale[part * heads + head], top / 448.0), "scale of a head");
      bool has_top = false;
      for (std::int64_t i = 0; i < (rows - part) * head_dim; ++i)
        has_top |=
            (out[part * rows * width + i / head_dim * width + head * head_dim + i % head_dim] &
             0x7f) == 0x7e;
      check(has_top, "the largest number of a head is 448");
    }
  }
}

}  // namespace

int main() {
  for (std::int64_t width : {1, 7, 64, 5120}) test_residual_gate_norm(width);
  test_qk_rmsnorm_rope(3, 16);
  test_qk_rmsnorm_rope(5, 6);
  test_qk_rmsnorm_rope(2, 600);
  test_unpack_and_merge();
  test_patches_and_steps();
  test_latents();
  for (std::int64_t channels : {1, 5, 96}) test_pictures(channels);
  for (std::int64_t width : {1, 7, 96, 5120}) test_quantize(width);
  for (std::int64_t head_dim : {2, 12, 128}) test_quantize_heads(head_dim);
  for (std::int64_t width : {7, 96, 5120}) test_norm_in_eight_bits(width);
  std::printf("%s: %s\n", cpu_isa(), num_failures == 0 ? "all passed" : "some failed");
  return num_failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
