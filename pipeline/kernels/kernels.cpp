// Operators that do in one pass over the activations what takes torch many operators. The Python module that calls an
// operator says what it computes and explains its arguments.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t LANES = 16;        // floats in one vector
constexpr int64_t GRAIN = 1 << 14;   // the fewest values that are worth a thread
constexpr int TILE = 4;              // outputs that are computed together
constexpr int64_t PAIRED = 32;       // bytes that hold 64 weights of 4 bits: weight j in the low half of byte j, weight
                                     // 32 + j in the high half

// Round a finite value to nearest, half to even.
void round_to(float value, float* to) { *to = value; }
void round_to(float value, at::BFloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  to->x = static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// Return the values of a contiguous tensor with exactly `count` values.
const float* read_values(const at::Tensor& tensor, int64_t count, const char* name) {
  TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == count, name, " needs ", count, " values in contiguous memory");
  return tensor.const_data_ptr<float>();
}

void check_values(const at::Tensor& x) {
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "expected float32 or bfloat16, got ",
              x.scalar_type());
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) >= 1, "no values in a row");
}

// ---- Hadamard transforms --------------------------------------------------------------------------------------------

using Lanes = float __attribute__((vector_size(LANES * sizeof(float))));

Lanes load(const float* from) {
  Lanes values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

void store(float* to, Lanes values) { std::memcpy(to, &values, sizeof values); }

using Places = int32_t __attribute__((vector_size(LANES * sizeof(int32_t))));
constexpr Places PLACES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// One step within a vector: of two places whose numbers differ in the bit STEP, the lower one gets the sum and the other
// one the difference.
template <int STEP>
Lanes combine_lanes(Lanes values) {
#if defined(__clang__)
  const Lanes others = [&]<int... I>(std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(values, values, (I ^ STEP)...);
  }(std::make_integer_sequence<int, LANES>());
#else
  const Lanes others = __builtin_shuffle(values, PLACES ^ STEP);
#endif
  constexpr Places SIGNS = 1 - 2 * ((PLACES & STEP) / STEP);
  return others + values * __builtin_convertvector(SIGNS, Lanes);
}

// Multiply COUNT * LANES values by Sylvester's matrix of that order, in place and in registers.
template <int COUNT>
void transform_group(float* values) {
  Lanes group[COUNT];
#pragma GCC unroll 8
  for (int place = 0; place < COUNT; ++place)
    group[place] =
        combine_lanes<8>(combine_lanes<4>(combine_lanes<2>(combine_lanes<1>(load(values + place * LANES)))));
#pragma GCC unroll 3
  for (int step = 1; step < COUNT; step *= 2)
#pragma GCC unroll 8
    for (int place = 0; place < COUNT; ++place)
      if (!(place & step)) {
        const Lanes one = group[place], other = group[place + step];
        group[place] = one + other;
        group[place + step] = one - other;
      }
  for (int place = 0; place < COUNT; ++place) store(values + place * LANES, group[place]);
}

// Multiply each of the groups of COUNT * LANES values of values[width], and return the size of a group.
template <int COUNT>
int64_t transform_groups(float* values, int64_t width) {
  for (int64_t start = 0; start < width; start += COUNT * LANES) transform_group<COUNT>(values + start);
  return COUNT * LANES;
}

// Multiply each group of `order` values of values[width] by Sylvester's matrix of that order, in place.
void transform_sylvester(float* values, int64_t width, int64_t order) {
  int64_t step = 1;
  if (order >= 8 * LANES)
    step = transform_groups<8>(values, width);
  else if (order == 4 * LANES)
    step = transform_groups<4>(values, width);
  else if (order == 2 * LANES)
    step = transform_groups<2>(values, width);
  else if (order == LANES)
    step = transform_groups<1>(values, width);
  for (; step < order; step *= 2) {
    for (int64_t start = 0; start < width; start += 2 * step) {
      float *low = values + start, *high = low + step;
      if (step >= LANES) {
        for (int64_t i = 0; i < step; i += LANES) {
          const Lanes one = load(low + i), other = load(high + i);
          store(low + i, one + other);
          store(high + i, one - other);
        }
      } else {
        for (int64_t i = 0; i < step; ++i) {
          const float one = low[i], other = high[i];
          low[i] = one + other;
          high[i] = one - other;
        }
      }
    }
  }
}

// Compute to[j, c] = sum over i < order of from[i, c] matrix[i, j], for the rows j = first … first + ROWS - 1 and the
// first COLUMNS * LANES columns of `width`.
template <int ROWS, int COLUMNS>
void transform_tile(const float* from, float* to, const float* matrix, int64_t order, int64_t width, int64_t first) {
  Lanes sums[ROWS][COLUMNS] = {};
  for (int64_t i = 0; i < order; ++i) {
    Lanes values[COLUMNS];
    for (int column = 0; column < COLUMNS; ++column) values[column] = load(from + i * width + column * LANES);
    const float* entries = matrix + i * order + first;
    for (int row = 0; row < ROWS; ++row)
      for (int column = 0; column < COLUMNS; ++column) sums[row][column] += values[column] * entries[row];
  }
  for (int row = 0; row < ROWS; ++row)
    for (int column = 0; column < COLUMNS; ++column)
      store(to + (first + row) * width + column * LANES, sums[row][column]);
}

// Do the same for all rows and columns. The orders of Paley's matrices are multiples of 4.
void transform_columns(const float* from, float* to, const float* matrix, int64_t order, int64_t width) {
  int64_t c = 0;
  for (; c + 4 * LANES <= width; c += 4 * LANES)
    for (int64_t j = 0; j < order; j += 4) transform_tile<4, 4>(from + c, to + c, matrix, order, width, j);
  for (; c + LANES <= width; c += LANES) {
    int64_t j = 0;
    for (; j + 12 <= order; j += 12) transform_tile<12, 1>(from + c, to + c, matrix, order, width, j);
    for (; j < order; j += 4) transform_tile<4, 1>(from + c, to + c, matrix, order, width, j);
  }
  for (; c < width; ++c) {
    for (int64_t j = 0; j < order; ++j) {
      float sum = 0;
      for (int64_t i = 0; i < order; ++i) sum += from[i * width + c] * matrix[i * order + j];
      to[j * width + c] = sum;
    }
  }
}

// Paley's second construction makes a matrix from a conference matrix C of half the order:
//
//     C ⊗ [1 1; 1 -1] + I ⊗ [1 -1; -1 -1]
//
// With the sums s and the differences d of neighbouring values, the result is C s + d in even places and C d - s in odd
// ones, half the work of the whole matrix. C is symmetric, with zeros on the diagonal.

// Compute the results of C for its rows j = first … first + ROWS - 1, and for LANES columns of `width`. `from` holds s and
// d by turns.
template <int ROWS>
void transform_pair_tile(const float* from, float* to, const float* conference, int64_t half, int64_t width,
                         int64_t first) {
  Lanes even[ROWS], odd[ROWS];
  for (int row = 0; row < ROWS; ++row) {
    even[row] = load(from + (2 * (first + row) + 1) * width);
    odd[row] = -load(from + 2 * (first + row) * width);
  }
  for (int64_t i = 0; i < half; ++i) {
    const Lanes sum = load(from + 2 * i * width), difference = load(from + (2 * i + 1) * width);
    const float* entries = conference + i * half + first;
    for (int row = 0; row < ROWS; ++row) {
      even[row] += sum * entries[row];
      odd[row] += difference * entries[row];
    }
  }
  for (int row = 0; row < ROWS; ++row) {
    store(to + 2 * (first + row) * width, even[row]);
    store(to + (2 * (first + row) + 1) * width, odd[row]);
  }
}

// Compute the same as `transform_columns` for such a matrix. `width` is a multiple of LANES. Overwrites `from`.
void transform_pairs(float* from, float* to, const float* conference, int64_t half, int64_t width) {
  for (int64_t i = 0; i < half; ++i)
    for (int64_t c = 0; c < width; c += LANES) {
      float *low = from + 2 * i * width + c, *high = low + width;
      const Lanes one = load(low), other = load(high);
      store(low, one + other);
      store(high, one - other);
    }
  for (int64_t c = 0; c < width; c += LANES) {
    int64_t j = 0;
    for (; j + 6 <= half; j += 6) transform_pair_tile<6>(from + c, to + c, conference, half, width, j);
    for (; j < half; j += 2) transform_pair_tile<2>(from + c, to + c, conference, half, width, j);
  }
}

// A Hadamard matrix: the Kronecker product of Paley's matrices, [order, order] each, and Sylvester's of order
// `sylvester`.
struct Transform {
  std::vector<const float*> paley;
  std::vector<std::vector<float>> conferences;  // of each of Paley's matrices; empty for those of his first construction
  std::vector<int64_t> orders;
  int64_t sylvester, order;

  Transform(const std::vector<at::Tensor>& matrices, int64_t power) : sylvester(power), order(power) {
    TORCH_CHECK(power >= 1 && (power & (power - 1)) == 0, "sylvester=", power, " is not a power of two");
    for (const at::Tensor& matrix : matrices) {
      TORCH_CHECK(matrix.dim() == 2 && matrix.size(0) == matrix.size(1) && matrix.size(0) % 4 == 0 &&
                      matrix.is_contiguous(),
                  "a Paley matrix must be square, contiguous, and of an order that is a multiple of 4");
      paley.push_back(matrix.data_ptr<float>());
      conferences.push_back(find_conference(paley.back(), matrix.size(0)));
      orders.push_back(matrix.size(0));
      order *= matrix.size(0);
    }
  }

  static std::vector<float> find_conference(const float* matrix, int64_t size) {
    if (matrix[1] > 0) return {};  // the first construction has a row of ones
    const int64_t half = size / 2;
    std::vector<float> conference(half * half);
    for (int64_t i = 0; i < half; ++i)
      for (int64_t j = 0; j < half; ++j) conference[i * half + j] = i == j ? 0 : matrix[2 * i * size + 2 * j];
    return conference;
  }

  // Multiply values[order] by the matrix. Returns where the result is, in `values` or in `other`.
  float* apply(float* values, float* other) const {
    if (sylvester > 1) transform_sylvester(values, order, sylvester);
    int64_t width = sylvester;
    for (int64_t place = static_cast<int64_t>(paley.size()) - 1; place >= 0; --place) {
      const int64_t size = orders[place] * width;
      const bool in_pairs = width % LANES == 0 && !conferences[place].empty();
      for (int64_t start = 0; start < order; start += size)
        if (in_pairs)
          transform_pairs(values + start, other + start, conferences[place].data(), orders[place] / 2, width);
        else
          transform_columns(values + start, other + start, paley[place], orders[place], width);
      std::swap(values, other);
      width = size;
    }
    return values;
  }
};

template <typename scalar_t>
void quantize_rows(const scalar_t* x, uint8_t* codes, int64_t first, int64_t last, int64_t width,
                   const Transform& transform, const float* shift, float factor, float zero, float largest) {
  const int64_t order = transform.order == 1 ? width : transform.order;
  std::vector<float> buffer(2 * order);
  for (int64_t row = first; row < last; ++row) {
    for (int64_t start = 0; start < width; start += order) {
      float* values = buffer.data();
      const scalar_t* from = x + row * width + start;
      uint8_t* to = codes + row * width + start;
      for (int64_t i = 0; i < order; ++i) values[i] = static_cast<float>(from[i]);
      if (transform.order > 1) values = transform.apply(values, values + order);
      const float* block_shift = shift + start;
      for (int64_t i = 0; i < order; ++i) {
        const float code = std::nearbyint(values[i] * factor - block_shift[i]) + zero;
        to[i] = static_cast<uint8_t>(static_cast<int32_t>(std::min(std::max(code, 0.f), largest)));
      }
    }
  }
}

at::Tensor rotated_codes(const at::Tensor& x, const std::vector<at::Tensor>& paley, int64_t sylvester,
                         const at::Tensor& shift, double scale, int64_t zero_point, int64_t largest) {
  check_values(x);
  const at::Tensor input = x.contiguous();
  const Transform transform(paley, sylvester);
  const int64_t width = input.size(-1), rows = input.numel() / width;
  TORCH_CHECK(width % transform.order == 0, "a transform of order ", transform.order, " does not divide a width of ",
              width);
  at::Tensor codes = at::empty(input.sizes(), input.options().dtype(at::kByte));
  const float* shifts = read_values(shift, width, "shift");
  const float factor = static_cast<float>(1 / (scale * std::sqrt(static_cast<double>(transform.order))));
  auto run = [&](const auto* values) {
    uint8_t* to = codes.data_ptr<uint8_t>();
    at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / width), [&](int64_t first, int64_t last) {
      quantize_rows(values, to, first, last, width, transform, shifts, factor, zero_point, largest);
    });
  };
  if (input.scalar_type() == at::kBFloat16)
    run(input.const_data_ptr<at::BFloat16>());
  else
    run(input.const_data_ptr<float>());
  return codes;
}

// Round each row of x, times the matrix, to integers from -127 to 127 with a scale of its own.
std::tuple<at::Tensor, at::Tensor> row_codes(const at::Tensor& x, const std::vector<at::Tensor>& paley,
                                             int64_t sylvester) {
  check_values(x);
  const at::Tensor input = x.contiguous();
  const Transform transform(paley, sylvester);
  const int64_t width = input.size(-1), rows = input.numel() / width;
  const int64_t order = transform.order == 1 ? width : transform.order;
  TORCH_CHECK(width % order == 0, "a transform of order ", order, " does not divide a width of ", width);
  auto shape = input.sizes().vec();
  at::Tensor codes = at::empty(shape, input.options().dtype(at::kChar));
  shape.back() = 1;
  at::Tensor scales = at::empty(shape, input.options().dtype(at::kFloat));
  const float norm = static_cast<float>(1 / std::sqrt(static_cast<double>(transform.order)));
  auto run = [&](const auto* from) {
    int8_t* to = codes.data_ptr<int8_t>();
    float* scale = scales.data_ptr<float>();
    at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / width), [&](int64_t first, int64_t last) {
      std::vector<float> buffer(2 * order), row_values(width);
      for (int64_t row = first; row < last; ++row) {
        float largest = 0;
        for (int64_t start = 0; start < width; start += order) {
          float* values = buffer.data();
          for (int64_t i = 0; i < order; ++i) values[i] = static_cast<float>(from[row * width + start + i]);
          if (transform.order > 1) values = transform.apply(values, values + order);
          for (int64_t i = 0; i < order; ++i) {
            row_values[start + i] = values[i] * norm;
            largest = std::max(largest, std::abs(row_values[start + i]));
          }
        }
        scale[row] = largest > 0 ? largest / 127 : 1;
        for (int64_t i = 0; i < width; ++i)
          to[row * width + i] =
              static_cast<int8_t>(std::min(std::max(std::nearbyint(row_values[i] / scale[row]), -128.f), 127.f));
      }
    });
  };
  if (input.scalar_type() == at::kBFloat16)
    run(input.const_data_ptr<at::BFloat16>());
  else
    run(input.const_data_ptr<float>());
  return {codes, scales};
}

// ---- Keys -----------------------------------------------------------------------------------------------------------

// Call use(row, head, values, constant) for each key after RoPE. `values` [width] is the key without RoPE(mean), times
// Sylvester's matrix; `constant` [width] is RoPE(mean), or zero.
template <typename scalar_t, typename Use>
void visit_keys(const at::Tensor& keys, const at::Tensor& positions, const std::optional<at::Tensor>& table,
                const std::optional<at::Tensor>& mean, int64_t heads, int64_t sylvester, const Use& use) {
  const at::Tensor row_positions = positions.contiguous();
  const int64_t width = keys.size(1) / heads, half = width / 2, rows = keys.size(0);
  TORCH_CHECK(Transform({}, sylvester).order == sylvester && width % sylvester == 0, "sylvester=", sylvester,
              " does not divide head_dim=", width);
  const float* means = mean ? read_values(*mean, heads * width, "mean") : nullptr;
  TORCH_CHECK(!means || table, "a mean needs a table of cosines and sines");
  const at::Tensor turns = means ? table->contiguous() : keys;
  const int64_t* position = row_positions.const_data_ptr<int64_t>();
  if (means) {
    TORCH_CHECK(turns.dim() == 2 && turns.size(1) == width && turns.scalar_type() == keys.scalar_type(),
                "the table needs [positions, head_dim] cosines and sines in the dtype of the keys");
    TORCH_CHECK(row_positions.numel() == rows, "expected one position per row");
    for (int64_t row = 0; row < rows; ++row)
      TORCH_CHECK(position[row] >= 0 && position[row] < turns.size(0), "position ", position[row],
                  " is outside a table of ", turns.size(0));
  }
  const scalar_t *from = keys.const_data_ptr<scalar_t>(), *cosines = turns.const_data_ptr<scalar_t>();
  at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / (heads * width)), [&](int64_t first, int64_t last) {
    std::vector<float> buffer(width), constant(width, 0.f);
    for (int64_t row = first; row < last; ++row) {
      const scalar_t* cosine = means ? cosines + position[row] * width : cosines;
      const scalar_t* sine = cosine + half;
      for (int64_t head = 0; head < heads; ++head) {
        const scalar_t* key = from + (row * heads + head) * width;
        if (means) {
          const float *low = means + head * width, *high = low + half;
          for (int64_t i = 0; i < half; ++i) {
            const float cos_i = cosine[i], sin_i = sine[i];
            constant[i] = low[i] * cos_i - high[i] * sin_i;
            constant[half + i] = high[i] * cos_i + low[i] * sin_i;
          }
        }
        float* values = buffer.data();
        for (int64_t i = 0; i < width; ++i) values[i] = static_cast<float>(key[i]) - constant[i];
        transform_sylvester(values, width, sylvester);
        use(row, head, values, constant.data());
      }
    }
  });
}

void check_keys(const at::Tensor& keys, const at::Tensor& scale) {
  check_values(keys);
  TORCH_CHECK(keys.dim() == 2 && scale.numel() >= 1 && keys.size(1) % scale.numel() == 0,
              "the width of the keys is not a multiple of the number of scales (one per head)");
}

at::Tensor cached_keys(const at::Tensor& keys, const at::Tensor& positions, const std::optional<at::Tensor>& table,
                       const std::optional<at::Tensor>& mean, const at::Tensor& scale,
                       const std::optional<at::Tensor>& zero_point, int64_t sylvester, int64_t lowest,
                       int64_t highest) {
  check_keys(keys, scale);
  const at::Tensor input = keys.contiguous();
  const int64_t heads = scale.numel(), width = input.size(1) / heads;
  const float* scales = read_values(scale, heads, "scale");
  const float* zeros = zero_point ? read_values(*zero_point, heads, "zero_point") : nullptr;
  at::Tensor result = at::empty_like(input);
  const float norm = static_cast<float>(1 / std::sqrt(static_cast<double>(sylvester)));
  auto run = [&](auto* to) {
    using scalar_t = std::decay_t<decltype(*to)>;
    auto use = [&](int64_t row, int64_t head, float* values, const float* constant) {
      scalar_t* target = to + (row * heads + head) * width;
      const float factor = scales[head], zero = zeros ? zeros[head] : 0.f;
      for (int64_t i = 0; i < width; ++i) {
        const float code = std::nearbyint(values[i] * norm / factor) + zero;
        values[i] = (std::min(std::max(code, static_cast<float>(lowest)), static_cast<float>(highest)) - zero) *
                    factor * norm;
      }
      transform_sylvester(values, width, sylvester);
      for (int64_t i = 0; i < width; ++i) round_to(values[i] + constant[i], target + i);
    };
    visit_keys<scalar_t>(input, positions, table, mean, heads, sylvester, use);
  };
  if (input.scalar_type() == at::kBFloat16)
    run(result.data_ptr<at::BFloat16>());
  else
    run(result.data_ptr<float>());
  return result;
}

// ---- A cache of codes -----------------------------------------------------------------------------------------------

// A product and the sum after it are rounded separately in functions marked so, as torch does it.
#if defined(__clang__)
#define UNFUSED
#define UNFUSED_BODY _Pragma("clang fp contract(off)")
#else
#define UNFUSED __attribute__((noinline, optimize("fp-contract=off")))
#define UNFUSED_BODY
#endif

// How the states of one head are stored: value = (code + lowest - zero) * scale + shift[i].
struct Grid {
  int64_t bits, width;
  float lowest = 0, highest = 0, zero = 0, scale = 1;
  const float* shift = nullptr;  // [width], or null
};

constexpr int64_t CODES = 64;  // codes that are packed together, a multiple of 8

// Codes lie end to end, the first one in the lowest bits (pipeline/numerics/packing.py).
void unpack_row(const uint8_t* from, const Grid& grid, float* to) {
  const int64_t bits = grid.bits, width = grid.width;
  if (bits == 8) {
    for (int64_t i = 0; i < width; ++i) to[i] = from[i];
  } else if (bits == 4) {
    for (int64_t j = 0; j < width / 2; ++j) {
      to[2 * j] = static_cast<float>(from[j] & 15);
      to[2 * j + 1] = static_cast<float>(from[j] >> 4);
    }
    if (width % 2) to[width - 1] = static_cast<float>(from[width / 2] & 15);
  } else {
    const int64_t bytes = (width * bits + 7) / 8;
    for (int64_t i = 0; i < width; i += 8) {  // eight codes fill `bits` bytes
      uint64_t word = 0;
      std::memcpy(&word, from + i / 8 * bits, std::min(bits, bytes - i / 8 * bits));
      for (int64_t k = 0; k < std::min<int64_t>(8, width - i); ++k)
        to[i + k] = static_cast<float>((word >> (k * bits)) & ((1u << bits) - 1));
    }
  }
}

void pack_row(const uint8_t* codes, const Grid& grid, uint8_t* to) {
  const int64_t bits = grid.bits, width = grid.width, bytes = (width * bits + 7) / 8;
  for (int64_t i = 0; i < width; i += 8) {
    uint64_t word = 0;
    for (int64_t k = 0; k < std::min<int64_t>(8, width - i); ++k) word |= static_cast<uint64_t>(codes[i + k]) << (k * bits);
    std::memcpy(to + i / 8 * bits, &word, std::min(bits, bytes - i / 8 * bits));
  }
}

UNFUSED void scale_row(const Grid& grid, float* values) {
  UNFUSED_BODY
  const float offset = grid.lowest - grid.zero;
  for (int64_t i = 0; i < grid.width; ++i) values[i] = (values[i] + offset) * grid.scale;
  if (grid.shift)
    for (int64_t i = 0; i < grid.width; ++i) values[i] += grid.shift[i];
}

// Add RoPE(mean): mean[width] of keys before RoPE, turned by the cosines and sines of a position, [width / 2] each.
UNFUSED void add_turned(const float* mean, const float* cosine, const float* sine, int64_t half, float* values) {
  UNFUSED_BODY
  for (int64_t i = 0; i < half; ++i) {
    values[i] += mean[i] * cosine[i] - mean[half + i] * sine[i];
    values[half + i] += mean[half + i] * cosine[i] + mean[i] * sine[i];
  }
}

// Compute to[r, j] = sum over i of rows[r, i] matrix[i, j], one term after the other, for COLUMNS * LANES columns.
template <int ROWS, int COLUMNS>
void multiply_matrix(const float* rows, const float* matrix, int64_t width, int64_t column, float* to) {
  Lanes sums[ROWS][COLUMNS] = {};
  for (int64_t i = 0; i < width; ++i) {
    Lanes entries[COLUMNS];
    for (int c = 0; c < COLUMNS; ++c) entries[c] = load(matrix + i * width + column + c * LANES);
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < COLUMNS; ++c) sums[r][c] += rows[r * width + i] * entries[c];
  }
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < COLUMNS; ++c) store(to + r * width + column + c * LANES, sums[r][c]);
}

constexpr int64_t TOGETHER_ROWS = 4;  // rows that are multiplied by a matrix together

void multiply_matrix_rows(const float* rows, const float* matrix, int64_t width, float* to) {
  int64_t column = 0;
  for (; column + 4 * LANES <= width; column += 4 * LANES)
    multiply_matrix<TOGETHER_ROWS, 4>(rows, matrix, width, column, to);
  for (; column < width; column += LANES) multiply_matrix<TOGETHER_ROWS, 1>(rows, matrix, width, column, to);
}

std::vector<Grid> read_grids(int64_t heads, int64_t width, int64_t bits, int64_t lowest, const at::Tensor& scale,
                             const std::optional<at::Tensor>& zero_point, const std::optional<at::Tensor>& shift) {
  TORCH_CHECK(bits >= 2 && bits <= 8, "bits=", bits, " is not in 2 … 8");
  const float* scales = read_values(scale, heads, "scale");
  const float* zeros = zero_point ? read_values(*zero_point, heads, "zero_point") : nullptr;
  const float* shifts = shift ? read_values(*shift, heads * width, "shift") : nullptr;
  std::vector<Grid> grids;
  for (int64_t head = 0; head < heads; ++head)
    grids.push_back({bits, width, static_cast<float>(lowest), static_cast<float>(lowest + (1 << bits) - 1),
                     zeros ? zeros[head] : 0.f, scales[head], shifts ? shifts + head * width : nullptr});
  return grids;
}

at::Tensor pack_states(const at::Tensor& x, int64_t bits, int64_t lowest, const at::Tensor& scale,
                       const std::optional<at::Tensor>& zero_point, const std::optional<at::Tensor>& shift) {
  check_values(x);
  TORCH_CHECK(x.dim() == 4, "expected states [B, heads, T, d]");
  const at::Tensor input = x.contiguous();
  const int64_t heads = input.size(1), length = input.size(2), width = input.size(3);
  const int64_t rows = input.size(0) * heads * length, bytes = (width * bits + 7) / 8;
  const std::vector<Grid> grids = read_grids(heads, width, bits, lowest, scale, zero_point, shift);
  at::Tensor packed = at::empty({input.size(0), heads, length, bytes}, input.options().dtype(at::kByte));
  uint8_t* to = packed.data_ptr<uint8_t>();
  auto run = [&](const auto* from) {
    at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / width), [&](int64_t first, int64_t last) {
      std::vector<uint8_t> codes(width);
      for (int64_t row = first; row < last; ++row) {
        const Grid& grid = grids[row / length % heads];
        for (int64_t i = 0; i < width; ++i) {
          const float value = static_cast<float>(from[row * width + i]) - (grid.shift ? grid.shift[i] : 0.f);
          const float code = std::nearbyint(value / grid.scale) + grid.zero;
          codes[i] = static_cast<uint8_t>(
              static_cast<int32_t>(std::min(std::max(code, grid.lowest), grid.highest) - grid.lowest));
        }
        pack_row(codes.data(), grid, to + row * bytes);
      }
    });
  };
  if (input.scalar_type() == at::kBFloat16)
    run(input.const_data_ptr<at::BFloat16>());
  else
    run(input.const_data_ptr<float>());
  return packed;
}

// Return the packed codes of the keys whose states `cached_keys` returns.
at::Tensor key_codes(const at::Tensor& keys, const at::Tensor& positions, const std::optional<at::Tensor>& table,
                     const std::optional<at::Tensor>& mean, const at::Tensor& scale,
                     const std::optional<at::Tensor>& zero_point, int64_t sylvester, int64_t lowest, int64_t bits) {
  check_keys(keys, scale);
  const at::Tensor input = keys.contiguous();
  const int64_t heads = scale.numel(), width = input.size(1) / heads, bytes = (width * bits + 7) / 8;
  const std::vector<Grid> grids = read_grids(heads, width, bits, lowest, scale, zero_point, std::nullopt);
  at::Tensor packed = at::empty({input.size(0), heads * bytes}, input.options().dtype(at::kByte));
  uint8_t* to = packed.data_ptr<uint8_t>();
  const float norm = static_cast<float>(1 / std::sqrt(static_cast<double>(sylvester)));
  auto use = [&](int64_t row, int64_t head, float* values, const float*) {
    const Grid& grid = grids[head];
    uint8_t codes[CODES];
    for (int64_t start = 0; start < width; start += CODES) {
      const int64_t count = std::min(CODES, width - start);
      for (int64_t i = 0; i < count; ++i) {
        const float code = std::nearbyint(values[start + i] * norm / grid.scale) + grid.zero;
        codes[i] = static_cast<uint8_t>(
            static_cast<int32_t>(std::min(std::max(code, grid.lowest), grid.highest) - grid.lowest));
      }
      pack_row(codes, {bits, count}, to + (row * heads + head) * bytes + start * bits / 8);
    }
  };
  if (input.scalar_type() == at::kBFloat16)
    visit_keys<at::BFloat16>(input, positions, table, mean, heads, sylvester, use);
  else
    visit_keys<float>(input, positions, table, mean, heads, sylvester, use);
  return packed;
}

void unpack_states(at::Tensor& out, const at::Tensor& packed, int64_t first_place, int64_t bits, int64_t lowest,
                   const at::Tensor& scale, const std::optional<at::Tensor>& zero_point,
                   const std::optional<at::Tensor>& shift, const std::optional<at::Tensor>& matrix,
                   const std::optional<at::Tensor>& mean, const std::optional<at::Tensor>& places,
                   const std::optional<at::Tensor>& table) {
  check_values(out);
  TORCH_CHECK(out.dim() == 4 && packed.dim() == 4 && out.is_contiguous(), "expected out [B, heads, N, d], contiguous");
  const int64_t batch = out.size(0), heads = out.size(1), total = out.size(2), width = out.size(3);
  const at::Tensor input = packed.contiguous();
  const int64_t length = input.size(2), bytes = input.size(3), rows = batch * heads * length;
  TORCH_CHECK(input.size(0) == batch && input.size(1) == heads && bytes == (width * bits + 7) / 8 && first_place >= 0 &&
                  first_place + length <= total,
              "codes ", input.sizes(), " do not fit states ", out.sizes(), " from ", first_place);
  const std::vector<Grid> grids = read_grids(heads, width, bits, lowest, scale, zero_point, shift);
  const float* entries = matrix ? read_values(*matrix, width * width, "matrix") : nullptr;
  TORCH_CHECK(!entries || width % LANES == 0, "a matrix needs a width that is a multiple of ", LANES);
  const float* means = mean ? read_values(*mean, heads * width, "mean") : nullptr;
  const bool turns = means && places;
  TORCH_CHECK(!turns || table, "places need a table of cosines and sines");
  const at::Tensor row_places = turns ? places->contiguous() : input, turned = turns ? table->contiguous() : input;
  const int32_t* place = turns ? row_places.const_data_ptr<int32_t>() : nullptr;
  const float* cosines = turns ? turned.const_data_ptr<float>() : nullptr;
  int64_t place_rows = 1;
  if (turns) {
    TORCH_CHECK(turned.dim() == 2 && turned.size(1) == width && width % 2 == 0, "the table needs [positions, head_dim]");
    TORCH_CHECK(row_places.dim() == 2 && row_places.size(1) == length, "expected one place per position");
    place_rows = row_places.size(0);
    TORCH_CHECK(place_rows == 1 || place_rows == batch, "expected places of one row, or of all rows");
    for (int64_t i = 0; i < row_places.numel(); ++i)
      TORCH_CHECK(place[i] >= 0 && place[i] < turned.size(0), "place ", place[i], " is outside a table of ",
                  turned.size(0));
  }
  const uint8_t* from = input.const_data_ptr<uint8_t>();
  auto run = [&](auto* to) {
    at::parallel_for(0, rows, std::max<int64_t>(TOGETHER_ROWS, GRAIN / width), [&](int64_t first, int64_t last) {
      std::vector<float> buffer(2 * TOGETHER_ROWS * width);
      for (int64_t start = first; start < last; start += TOGETHER_ROWS) {
        const int64_t count = std::min(TOGETHER_ROWS, last - start);
        float* values = buffer.data();
        for (int64_t r = 0; r < count; ++r) {
          const Grid& grid = grids[(start + r) / length % heads];
          unpack_row(from + (start + r) * bytes, grid, values + r * width);
          scale_row(grid, values + r * width);
        }
        if (entries) {
          multiply_matrix_rows(values, entries, width, values + TOGETHER_ROWS * width);
          values += TOGETHER_ROWS * width;
        }
        for (int64_t r = 0; r < count; ++r) {
          const int64_t row = start + r, pair = row / length, t = row % length;
          float* value = values + r * width;
          if (turns) {
            const float* cosine = cosines + place[(place_rows == 1 ? 0 : pair / heads) * length + t] * width;
            add_turned(means + pair % heads * width, cosine, cosine + width / 2, width / 2, value);
          } else if (means) {
            for (int64_t i = 0; i < width; ++i) value[i] += means[pair % heads * width + i];
          }
          auto* target = to + (pair * total + first_place + t) * width;
          for (int64_t i = 0; i < width; ++i) round_to(value[i], target + i);
        }
      }
    });
  };
  if (out.scalar_type() == at::kBFloat16)
    run(out.data_ptr<at::BFloat16>());
  else
    run(out.data_ptr<float>());
}

// ---- Attention over codes -------------------------------------------------------------------------------------------

constexpr int64_t BLOCK = 2 * LANES;   // positions that are dequantized together
constexpr int64_t SPLIT = 512;         // positions that one task reads for a single query
constexpr int64_t QUERY_ROWS = 64;     // queries times heads that one task computes, about
constexpr int MOST_ROWS = 4;           // rows that are multiplied together

using Integers = int32_t __attribute__((vector_size(LANES * sizeof(int32_t))));
using Words = uint32_t __attribute__((vector_size(LANES * sizeof(uint32_t))));
using Bytes = uint8_t __attribute__((vector_size(LANES)));

constexpr Integers LANE = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Return e^x for x <= 0, with a relative error of 2e-7; 0 below -86 and for minus infinity.
Lanes exponential(Lanes x) {
  constexpr float TO_BITS = 12582912.f;  // 1.5 * 2^23: adding it moves the integer part into the lowest bits
  const Lanes bounded = x < -87.f ? Lanes{} - 87.f : x;
  const Lanes shifted = bounded * 1.44269504f + TO_BITS, power = shifted - TO_BITS;
  const Lanes rest = (bounded - power * 0.693359375f) + power * 2.12194440e-4f;
  Lanes sum = Lanes{} + 1.f / 5040;
  for (const float factor : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f}) sum = sum * rest + factor;
  Integers bits, exponent;
  std::memcpy(&bits, &sum, sizeof bits);
  std::memcpy(&exponent, &shifted, sizeof exponent);
  bits += exponent << 23;
  std::memcpy(&sum, &bits, sizeof sum);
  return x < -86.f ? Lanes{} : sum;
}

float find_largest(Lanes values) {
  float largest[LANES];
  std::memcpy(largest, &values, sizeof largest);
  for (int64_t step = LANES / 2; step > 0; step /= 2)
    for (int64_t i = 0; i < step; ++i) largest[i] = largest[i] > largest[i + step] ? largest[i] : largest[i + step];
  return largest[0];
}

float add_lanes(Lanes values) {
  float sums[LANES];
  std::memcpy(sums, &values, sizeof sums);
  for (int64_t step = LANES / 2; step > 0; step /= 2)
    for (int64_t i = 0; i < step; ++i) sums[i] += sums[i + step];
  return sums[0];
}

// The codes of the keys or values of a cache: value = level of the code * scale[head, i] + offset[head, i].
struct Codes {
  const uint8_t* from;
  int64_t page_stride, head_stride, row_stride, bits, width;
  const float *scale, *offset;  // [heads, width]
  const float* levels;          // [2^bits]; null: the level of a code is the code
};

// Write the levels of LANES rows as columns: to[i, row], i < width. BITS divides 32.
template <int BITS>
void unpack_columns(const uint8_t* const rows[LANES], int64_t width, float* to) {
  constexpr int64_t COUNT = 32 / BITS;
  for (int64_t start = 0; start < width; start += COUNT) {
    uint32_t loaded[LANES];
    for (int64_t row = 0; row < LANES; ++row) std::memcpy(loaded + row, rows[row] + start * BITS / 8, sizeof(uint32_t));
    Words words;
    std::memcpy(&words, loaded, sizeof words);
    for (int64_t k = 0; k < COUNT; ++k) {
      const Words codes = (words >> static_cast<uint32_t>(k * BITS)) & ((1u << BITS) - 1);
      store(to + (start + k) * LANES, __builtin_convertvector(reinterpret_cast<Integers>(codes), Lanes));
    }
  }
}

void unpack_any_columns(const uint8_t* const rows[LANES], const Codes& codes, float* to) {
  const int64_t width = codes.width;
  if (codes.bits == 4 && width % 8 == 0) {
    unpack_columns<4>(rows, width, to);
  } else if (codes.bits == 8 && width % 4 == 0) {
    unpack_columns<8>(rows, width, to);
  } else if (codes.bits == 2 && width % 16 == 0) {
    unpack_columns<2>(rows, width, to);
  } else {
    std::vector<float> values(width);
    for (int64_t row = 0; row < LANES; ++row) {
      unpack_row(rows[row], {codes.bits, width}, values.data());
      for (int64_t i = 0; i < width; ++i) to[i * LANES + row] = values[i];
    }
  }
  if (codes.levels)
    for (int64_t i = 0; i < width * LANES; ++i) to[i] = codes.levels[static_cast<int32_t>(to[i])];
}

// Return the channel that an unpacked row has at a place. With 4 bits, the first half of a row holds the channels in the
// low halves of bytes.
int64_t find_channel(const Codes& codes, int64_t place) {
  if (codes.bits != 4) return place;
  const int64_t half = codes.width / 2;
  return place < half ? 2 * place : 2 * (place - half) + 1;
}

// Write the values of one row, in the order of `find_channel`. `scale` and `offset` have this order, too.
void unpack_values(const uint8_t* from, const Codes& codes, const float* scale, const float* offset, float* to) {
  const int64_t width = codes.width, half = width / 2;
  if (codes.bits == 4) {
    int64_t j = 0;
    for (; j + LANES <= half; j += LANES) {
      Bytes bytes;
      std::memcpy(&bytes, from + j, sizeof bytes);
      const Integers both = __builtin_convertvector(bytes, Integers);
      store(to + j, __builtin_convertvector(both & 15, Lanes));
      store(to + half + j, __builtin_convertvector(both >> 4, Lanes));
    }
    for (; j < half; ++j) {
      to[j] = static_cast<float>(from[j] & 15);
      to[half + j] = static_cast<float>(from[j] >> 4);
    }
  } else {
    unpack_row(from, {codes.bits, width}, to);
  }
  if (codes.levels)
    for (int64_t i = 0; i < width; ++i) to[i] = codes.levels[static_cast<int32_t>(to[i])];
  for (int64_t i = 0; i < width; ++i) to[i] = to[i] * scale[i] + offset[i];
}

// Compute scores[r, block position] = rows[r] · keys, for ROWS rows of `width` and two groups of LANES positions. Keys
// are columns, [width, LANES] for each group.
template <int ROWS>
void multiply_keys(const float* rows, const float* one, const float* other, int64_t width, Lanes sums[ROWS][2]) {
  Lanes total[ROWS][2];
  for (int r = 0; r < ROWS; ++r)
    for (int group = 0; group < 2; ++group) total[r][group] = sums[r][group];
  for (int64_t i = 0; i < width; ++i) {
    const Lanes first = load(one + i * LANES), second = load(other + i * LANES);
    for (int r = 0; r < ROWS; ++r) {
      const float value = rows[r * width + i];
      total[r][0] += first * value;
      total[r][1] += second * value;
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int group = 0; group < 2; ++group) sums[r][group] = total[r][group];
}

// Add to sums[r] the sum over BLOCK positions of shares[r, position] values[position], for COUNT * LANES columns.
template <int ROWS, int COUNT>
void add_values(const float* shares, const float* values, int64_t width, int64_t column, float* sums) {
  Lanes total[ROWS][COUNT];
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < COUNT; ++c) total[r][c] = load(sums + r * width + column + c * LANES);
  for (int64_t k = 0; k < BLOCK; ++k) {
    Lanes entries[COUNT];
    for (int c = 0; c < COUNT; ++c) entries[c] = load(values + k * width + column + c * LANES);
    for (int r = 0; r < ROWS; ++r)
      for (int c = 0; c < COUNT; ++c) total[r][c] += entries[c] * shares[r * BLOCK + k];
  }
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < COUNT; ++c) store(sums + r * width + column + c * LANES, total[r][c]);
}

struct CodeAttention {
  Codes keys, values;
  const int32_t *pages, *starts, *lengths;
  int64_t page_columns, page_size, heads, kv_heads, width, prefix_tokens, window;
  const float *turn, *mean, *table, *prefix, *sinks;
  float scale;
  std::vector<float> value_scale, value_offset;  // [kv_heads, width], in the order of `find_channel`

  int64_t count_group() const { return heads / kv_heads; }
  const float* find_prefix(int64_t kind, int64_t head, int64_t position) const {
    return prefix + ((kind * kv_heads + head) * prefix_tokens + position) * width;
  }
};

// What one task computes: queries from `first` on, of one text and KV head, over the positions start … stop - 1.
struct Task {
  int64_t text, head, first, count, start, stop, partial;
};

// The memory of a thread. A task uses `padded` rows, a multiple of MOST_ROWS.
struct Rows {
  int64_t padded;
  std::vector<float> plain, turned, means, bias, shares, sums, largest, total, keys, values;

  Rows(int64_t most, int64_t width)
      : padded((most + MOST_ROWS - 1) / MOST_ROWS * MOST_ROWS), plain(padded * width), turned(padded * width),
        means(padded * width), bias(padded), shares(padded * BLOCK), sums(padded * width), largest(padded),
        total(padded), keys(BLOCK * width), values(BLOCK * width) {}

  void begin(int64_t rows) {
    padded = (rows + MOST_ROWS - 1) / MOST_ROWS * MOST_ROWS;
    for (std::vector<float>* values_of_rows : {&plain, &sums, &total})
      std::fill(values_of_rows->begin(), values_of_rows->end(), 0.f);
    std::fill(largest.begin(), largest.end(), -INFINITY);
  }
};

template <typename scalar_t>
void read_queries(const CodeAttention& a, const Task& task, const scalar_t* queries, Rows& rows) {
  const int64_t width = a.width, group = a.count_group(), half = width / 2;
  for (int64_t row = 0; row < task.count * group; ++row) {
    const int64_t token = a.starts[task.text] + task.first + row / group, head = task.head * group + row % group;
    const scalar_t* from = queries + (token * a.heads + head) * width;
    for (int64_t i = 0; i < width; ++i) rows.plain[row * width + i] = static_cast<float>(from[i]) * a.scale;
  }
  if (a.turn) {
    static_assert(MOST_ROWS == TOGETHER_ROWS);
    for (int64_t row = 0; row < rows.padded; row += MOST_ROWS)
      multiply_matrix_rows(rows.plain.data() + row * width, a.turn, width, rows.turned.data() + row * width);
  } else {
    std::copy_n(rows.plain.begin(), rows.padded * width, rows.turned.begin());
  }
  const float *scale = a.keys.scale + task.head * width, *offset = a.keys.offset + task.head * width;
  for (int64_t row = 0; row < rows.padded; ++row) {
    float* turned = rows.turned.data() + row * width;
    float bias = 0;
    for (int64_t i = 0; i < width; ++i) {
      bias += turned[i] * offset[i];
      turned[i] *= scale[i];
    }
    rows.bias[row] = bias;
    if (a.mean) {  // q · RoPE(mean) = the sum of cos[i] means[i] + sin[i] means[half + i]
      const float *plain = rows.plain.data() + row * width, *low = a.mean + task.head * width, *high = low + half;
      float* means = rows.means.data() + row * width;
      for (int64_t i = 0; i < half; ++i) {
        means[i] = low[i] * plain[i] + high[i] * plain[half + i];
        means[half + i] = low[i] * plain[half + i] - high[i] * plain[i];
      }
    }
  }
}

// Dequantize the keys (as columns) and values of BLOCK positions from `start` on. Positions from `stop` on repeat the
// last one; their scores are masked.
void read_block(const CodeAttention& a, const Task& task, int64_t start, int64_t stop, Rows& rows) {
  const int64_t width = a.width;
  const uint8_t *key_rows[BLOCK], *value_rows[BLOCK];
  int64_t column = start / a.page_size, place = start % a.page_size;
  for (int64_t k = 0; k < BLOCK; ++k) {
    const int64_t page = a.pages[task.text * a.page_columns + column];
    key_rows[k] = a.keys.from + page * a.keys.page_stride + task.head * a.keys.head_stride + place * a.keys.row_stride;
    value_rows[k] =
        a.values.from + page * a.values.page_stride + task.head * a.values.head_stride + place * a.values.row_stride;
    if (start + k + 1 < stop && ++place == a.page_size) {
      place = 0;
      ++column;
    }
  }
  for (int64_t k = 0; k < BLOCK; k += LANES)
    if (k == 0 || start + k < stop) unpack_any_columns(key_rows + k, a.keys, rows.keys.data() + k * width);
  const float *scale = a.value_scale.data() + task.head * width, *offset = a.value_offset.data() + task.head * width;
  for (int64_t k = 0; k < BLOCK; ++k) {
    float* to = rows.values.data() + k * width;
    if (start + k < a.prefix_tokens) {
      const float* from = a.find_prefix(1, task.head, start + k);
      for (int64_t i = 0; i < width; ++i) to[i] = from[find_channel(a.values, i)];
    } else if (start + k < stop) {
      unpack_values(value_rows[k], a.values, scale, offset, to);
    }
  }
}

// Compute the scores of ROWS rows at the BLOCK positions from `start` on, masked by minus infinity.
template <int ROWS>
void score_block(const CodeAttention& a, const Task& task, int64_t start, int64_t stop, const Rows& rows, int64_t row,
                 Lanes scores[ROWS][2]) {
  const int64_t width = a.width, group = a.count_group();
  for (int r = 0; r < ROWS; ++r) scores[r][0] = scores[r][1] = Lanes{} + rows.bias[row + r];
  const float* keys = rows.keys.data();
  multiply_keys<ROWS>(rows.turned.data() + row * width, keys, keys + LANES * width, width, scores);
  if (a.mean) {
    const float* table = a.table + start / LANES * LANES * width;
    multiply_keys<ROWS>(rows.means.data() + row * width, table, start + LANES < stop ? table + LANES * width : table,
                        width, scores);
  }
  const int64_t query = a.lengths[task.text] - (a.starts[task.text + 1] - a.starts[task.text]) + task.first;
  for (int r = 0; r < ROWS; ++r) {
    const int64_t position = query + std::min(row + r, task.count * group - 1) / group;
    for (int64_t k = 0; start + k < a.prefix_tokens && k < BLOCK; ++k) {
      const float *from = a.find_prefix(0, task.head, start + k), *plain = rows.plain.data() + (row + r) * width;
      float score = 0;
      for (int64_t i = 0; i < width; ++i) score += plain[i] * from[i];
      scores[r][k / LANES][k % LANES] = score;
    }
    const int64_t last = std::min(position, stop - 1) - start;
    const int64_t first = std::max<int64_t>(0, a.window > 0 ? position - a.window + 1 - start : 0);
    for (int64_t side = 0; side < 2; ++side) {
      const Integers place = LANE + static_cast<int32_t>(side * LANES);
      const Integers inside = (place >= static_cast<int32_t>(first)) & (place <= static_cast<int32_t>(last));
      scores[r][side] = inside ? scores[r][side] : Lanes{} - INFINITY;
    }
  }
}

// Attend from ROWS rows of a task to the BLOCK positions from `start` on.
template <int ROWS>
void attend_block(const CodeAttention& a, const Task& task, int64_t start, Rows& rows, int64_t row) {
  const int64_t width = a.width;
  Lanes scores[ROWS][2];
  score_block<ROWS>(a, task, start, task.stop, rows, row, scores);
  for (int r = 0; r < ROWS; ++r) {
    float *shares = rows.shares.data() + (row + r) * BLOCK, *sums = rows.sums.data() + (row + r) * width;
    const float before = rows.largest[row + r];
    const Lanes higher = scores[r][0] > scores[r][1] ? scores[r][0] : scores[r][1];
    const float largest = std::max(before, find_largest(higher));
    if (largest == -INFINITY) {  // no position so far
      std::fill(shares, shares + BLOCK, 0.f);
      continue;
    }
    const Lanes one = exponential(scores[r][0] - largest), other = exponential(scores[r][1] - largest);
    store(shares, one);
    store(shares + LANES, other);
    float shrunk = 1;
    if (largest != before) {
      shrunk = std::exp(before - largest);
      for (int64_t i = 0; i < width; ++i) sums[i] *= shrunk;
      rows.largest[row + r] = largest;
    }
    rows.total[row + r] = rows.total[row + r] * shrunk + add_lanes(one + other);
  }
  const float *shares = rows.shares.data() + row * BLOCK, *values = rows.values.data();
  float* sums = rows.sums.data() + row * width;
  int64_t column = 0;
  for (; column + 4 * LANES <= width; column += 4 * LANES) add_values<ROWS, 4>(shares, values, width, column, sums);
  for (; column < width; column += LANES) add_values<ROWS, 1>(shares, values, width, column, sums);
}

// Write for each row of a task: the largest score, the sum of e^(score - largest), and the sum of values times it.
template <typename scalar_t>
void run_task(const CodeAttention& a, const Task& task, const scalar_t* queries, Rows& rows, float* partials) {
  const int64_t width = a.width, count = task.count * a.count_group();
  rows.begin(count);
  read_queries(a, task, queries, rows);
  for (int64_t start = task.start / BLOCK * BLOCK; start < task.stop; start += BLOCK) {
    read_block(a, task, start, task.stop, rows);
    int64_t row = 0;
    for (; row + MOST_ROWS <= count; row += MOST_ROWS) attend_block<MOST_ROWS>(a, task, start, rows, row);
    if (count - row == 3)
      attend_block<3>(a, task, start, rows, row);
    else if (count - row == 2)
      attend_block<2>(a, task, start, rows, row);
    else if (count - row == 1)
      attend_block<1>(a, task, start, rows, row);
  }
  for (int64_t row = 0; row < count; ++row) {
    float* to = partials + (task.partial + row) * (width + 2);
    to[0] = rows.largest[row];
    to[1] = rows.total[row];
    std::copy_n(rows.sums.data() + row * width, width, to + 2);
  }
}

// Queries of one text and all its KV heads, whose partial results lie one after the other: [heads, parts, rows].
struct Result {
  int64_t text, first, count, parts, partial;
};

template <typename scalar_t>
void write_result(const CodeAttention& a, const Result& result, const float* partials, scalar_t* out) {
  const int64_t width = a.width, group = a.count_group(), rows = result.count * group;
  std::vector<float> sums(width);
  for (int64_t head = 0; head < a.kv_heads; ++head) {
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t query_head = head * group + row % group;
      const float* from = partials + (result.partial + head * result.parts * rows + row) * (width + 2);
      const int64_t step = rows * (width + 2);
      float largest = a.sinks ? a.sinks[query_head] : -INFINITY;
      for (int64_t part = 0; part < result.parts; ++part) largest = std::max(largest, from[part * step]);
      float total = a.sinks ? std::exp(a.sinks[query_head] - largest) : 0.f;
      std::fill(sums.begin(), sums.end(), 0.f);
      for (int64_t part = 0; part < result.parts; ++part) {
        const float share = std::exp(from[part * step] - largest);
        total += from[part * step + 1] * share;
        for (int64_t i = 0; i < width; ++i) sums[i] += from[part * step + 2 + i] * share;
      }
      const int64_t token = a.starts[result.text] + result.first + row / group;
      scalar_t* to = out + (token * a.heads + query_head) * width;
      for (int64_t i = 0; i < width; ++i) round_to(sums[i] / total, to + find_channel(a.values, i));
    }
  }
}

Codes read_codes(const at::Tensor& codes, int64_t heads, int64_t width, int64_t bits, const at::Tensor& scale,
                 const at::Tensor& offset, const std::optional<at::Tensor>& levels) {
  TORCH_CHECK(bits >= 2 && bits <= 8, "bits=", bits, " is not in 2 … 8");
  TORCH_CHECK(codes.dim() == 4 && codes.scalar_type() == at::kByte && codes.size(1) == heads &&
                  codes.size(3) == (width * bits + 7) / 8 && codes.stride(3) == 1,
              "codes ", codes.sizes(), " are not [pages, ", heads, ", page size, ", (width * bits + 7) / 8, "]");
  return {codes.const_data_ptr<uint8_t>(), codes.stride(0), codes.stride(1), codes.stride(2), bits, width,
          read_values(scale, heads * width, "scale"), read_values(offset, heads * width, "offset"),
          levels ? read_values(*levels, int64_t{1} << bits, "levels") : nullptr};
}

const int32_t* read_indices(const at::Tensor& tensor, int64_t count, const char* name) {
  TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == count && tensor.scalar_type() == at::kInt, name, " needs ",
              count, " values, int32 in contiguous memory");
  return tensor.const_data_ptr<int32_t>();
}

void attend_codes(at::Tensor& out, const at::Tensor& queries, const at::Tensor& key_codes, const at::Tensor& value_codes,
                  const at::Tensor& pages, const at::Tensor& starts, const at::Tensor& lengths, int64_t key_bits,
                  const at::Tensor& key_scale, const at::Tensor& key_offset, const std::optional<at::Tensor>& key_levels,
                  int64_t value_bits, const at::Tensor& value_scale, const at::Tensor& value_offset,
                  const std::optional<at::Tensor>& value_levels, const std::optional<at::Tensor>& turn,
                  const std::optional<at::Tensor>& mean, const std::optional<at::Tensor>& table,
                  const std::optional<at::Tensor>& prefix, const std::optional<at::Tensor>& sinks, double scale,
                  int64_t window) {
  check_values(queries);
  TORCH_CHECK(queries.dim() == 3 && out.sizes() == queries.sizes() && out.scalar_type() == queries.scalar_type() &&
                  out.is_contiguous(),
              "expected queries [tokens, heads, head_dim], and out like them, contiguous");
  const at::Tensor input = queries.contiguous();
  const int64_t tokens = input.size(0), heads = input.size(1), width = input.size(2), texts = lengths.numel();
  TORCH_CHECK(key_codes.dim() == 4 && key_codes.size(1) >= 1 && heads % key_codes.size(1) == 0,
              "the number of query heads is not a multiple of the KV heads");
  TORCH_CHECK(width % LANES == 0, "head_dim=", width, " is not a multiple of ", LANES);
  const int64_t kv_heads = key_codes.size(1), page_size = key_codes.size(2);
  TORCH_CHECK(pages.dim() == 2 && pages.size(0) == texts && value_codes.sizes().slice(0, 3) == key_codes.sizes().slice(0, 3),
              "expected one row of pages per text, and as many pages of values as of keys");
  CodeAttention a;
  a.keys = read_codes(key_codes, kv_heads, width, key_bits, key_scale, key_offset, key_levels);
  a.values = read_codes(value_codes, kv_heads, width, value_bits, value_scale, value_offset, value_levels);
  a.pages = read_indices(pages, texts * pages.size(1), "pages");
  a.starts = read_indices(starts, texts + 1, "starts");
  a.lengths = read_indices(lengths, texts, "lengths");
  a.page_columns = pages.size(1);
  a.page_size = page_size;
  a.heads = heads;
  a.kv_heads = kv_heads;
  a.width = width;
  a.window = window;
  a.scale = static_cast<float>(scale);
  a.turn = turn ? read_values(*turn, width * width, "turn") : nullptr;
  a.mean = mean ? read_values(*mean, kv_heads * width, "mean") : nullptr;
  TORCH_CHECK(!a.mean || (table && table->dim() == 3), "a mean needs a table of cosines and sines");
  a.table = a.mean ? read_values(*table, table->size(0) * width * LANES, "table") : nullptr;
  a.prefix_tokens = prefix ? prefix->size(2) : 0;
  a.prefix = prefix ? read_values(*prefix, 2 * kv_heads * a.prefix_tokens * width, "prefix") : nullptr;
  a.sinks = sinks ? read_values(*sinks, heads, "sinks") : nullptr;
  for (int64_t head = 0; head < kv_heads; ++head)
    for (int64_t i = 0; i < width; ++i) {
      a.value_scale.push_back(a.values.scale[head * width + find_channel(a.values, i)]);
      a.value_offset.push_back(a.values.offset[head * width + find_channel(a.values, i)]);
    }
  std::vector<Task> tasks;
  std::vector<Result> results;
  int64_t partials = 0, most = 0;
  const int64_t group = a.count_group(), together = std::max<int64_t>(1, QUERY_ROWS / group);
  for (int64_t text = 0; text < texts; ++text) {
    const int64_t length = a.lengths[text], count = a.starts[text + 1] - a.starts[text];
    TORCH_CHECK(a.starts[text] >= 0 && count >= 0 && a.starts[text + 1] <= tokens && count <= length,
                "text ", text, ": queries ", a.starts[text], " to ", a.starts[text + 1], " of ", tokens, ", length ", length);
    if (count == 0) continue;
    TORCH_CHECK((length - 1) / page_size < a.page_columns, "text ", text, " of ", length, " tokens has too few pages");
    TORCH_CHECK(!a.mean || length <= table->size(0) * LANES, "length ", length, " is outside a table of ",
                table->size(0) * LANES);
    for (int64_t first = 0; first < count; first += together) {
      const int64_t rows = std::min(together, count - first), position = length - count + first;
      const int64_t start = std::max<int64_t>(0, window > 0 ? position - window + 1 : 0) / BLOCK * BLOCK;
      const int64_t stop = position + rows, parts = count == 1 ? (stop - start + SPLIT - 1) / SPLIT : 1;
      for (int64_t place = start / page_size; place <= (stop - 1) / page_size; ++place) {
        const int64_t page = a.pages[text * a.page_columns + place];
        TORCH_CHECK(page >= 0 && page < key_codes.size(0), "page ", page, " is outside a cache of ", key_codes.size(0));
      }
      results.push_back({text, first, rows, parts, partials});
      most = std::max(most, rows * group);
      for (int64_t head = 0; head < kv_heads; ++head)
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t from = start + part * SPLIT, to = parts == 1 ? stop : std::min(stop, from + SPLIT);
          tasks.push_back({text, head, first, rows, from, to, partials});
          partials += rows * group;
        }
    }
  }
  // Tasks that read the same rows of the table follow each other, so that these stay in the processor's cache.
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& one, const Task& other) { return one.start < other.start; });
  std::vector<float> buffer(partials * (width + 2));
  auto run = [&](const auto* from, auto* to) {
    std::atomic<int64_t> next{static_cast<int64_t>(tasks.size()) - 1};  // the last ones take longest
    at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), tasks.size()), 1, [&](int64_t, int64_t) {
      Rows memory(most, width);
      for (int64_t task = next--; task >= 0; task = next--) run_task(a, tasks[task], from, memory, buffer.data());
    });
    at::parallel_for(0, results.size(), std::max<int64_t>(1, GRAIN / (heads * width)), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) write_result(a, results[i], buffer.data(), to);
    });
  };
  if (input.scalar_type() == at::kBFloat16)
    run(input.const_data_ptr<at::BFloat16>(), out.data_ptr<at::BFloat16>());
  else
    run(input.const_data_ptr<float>(), out.data_ptr<float>());
}

// Copy the codes of tokens to their places in a cache [pages, heads, page size, bytes]: place = page * page size + row.
// Tokens with a negative place are left out.
void store_codes(at::Tensor& cache, const at::Tensor& codes, const at::Tensor& places) {
  TORCH_CHECK(cache.dim() == 4 && cache.scalar_type() == at::kByte && cache.stride(3) == 1 && codes.dim() == 2 &&
                  codes.scalar_type() == at::kByte && codes.size(1) == cache.size(1) * cache.size(3) &&
                  places.numel() <= codes.size(0) && places.scalar_type() == at::kLong,
              "codes ", codes.sizes(), " do not fit a cache ", cache.sizes());
  const at::Tensor input = codes.contiguous(), rows = places.contiguous();
  const int64_t heads = cache.size(1), size = cache.size(2), bytes = cache.size(3);
  const int64_t* place = rows.const_data_ptr<int64_t>();
  const uint8_t* from = input.const_data_ptr<uint8_t>();
  uint8_t* to = cache.data_ptr<uint8_t>();
  for (int64_t token = 0; token < rows.numel(); ++token) {
    if (place[token] < 0) continue;
    TORCH_CHECK(place[token] < cache.size(0) * size, "place ", place[token], " is outside the cache");
    uint8_t* page = to + place[token] / size * cache.stride(0) + place[token] % size * cache.stride(2);
    for (int64_t head = 0; head < heads; ++head)
      std::memcpy(page + head * cache.stride(1), from + (token * heads + head) * bytes, bytes);
  }
}

// ---- Products -------------------------------------------------------------------------------------------------------

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
// Write the sum of each of four vectors.
void add_up(const __m512i vectors[4], int32_t sums[4]) {
  auto interleave = [](__m512i one, __m512i other) {
    return _mm512_add_epi32(_mm512_unpacklo_epi32(one, other), _mm512_unpackhi_epi32(one, other));
  };
  const __m512i first = interleave(vectors[0], vectors[1]), second = interleave(vectors[2], vectors[3]);
  const __m512i quarters =
      _mm512_add_epi32(_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second));
  const __m256i halves = _mm256_add_epi32(_mm512_castsi512_si256(quarters), _mm512_extracti64x4_epi64(quarters, 1));
  const __m128i total = _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(sums), total);
}
#endif

// Compute sums[row * TILE + output] = codes[row] · weights[output] for TILE outputs and ROWS rows. Weights are 0 to 15.
template <int ROWS>
void multiply_tile(const uint8_t* codes, int64_t width, const uint8_t* packed, int32_t* sums) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  __m512i totals[TILE * ROWS];
  for (__m512i& total : totals) total = _mm512_setzero_si512();
  const __m512i mask = _mm512_set1_epi8(0x0F);
  for (int64_t place = 0; place < width; place += 2 * PAIRED) {
    __m512i values[ROWS];
    for (int row = 0; row < ROWS; ++row) values[row] = _mm512_loadu_si512(codes + row * width + place);
    for (int output = 0; output < TILE; ++output) {
      const uint8_t* from = packed + output * (width / 2) + place / 2;
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(bytes), _mm256_srli_epi16(bytes, 4), 1);
      const __m512i weights = _mm512_and_si512(both, mask);
      for (int row = 0; row < ROWS; ++row) {
        __m512i& total = totals[row * TILE + output];
        total = _mm512_dpbusd_epi32(total, values[row], weights);
      }
    }
  }
  for (int row = 0; row < ROWS; ++row) add_up(totals + row * TILE, sums + row * TILE);
#else
  for (int output = 0; output < TILE; ++output) {
    for (int row = 0; row < ROWS; ++row) {
      int32_t total = 0;
      for (int64_t place = 0; place < width; place += 2 * PAIRED) {
        const uint8_t* bytes = packed + output * (width / 2) + place / 2;
        const uint8_t* values = codes + row * width + place;
        for (int64_t j = 0; j < PAIRED; ++j)
          total += values[j] * (bytes[j] & 0x0F) + values[PAIRED + j] * (bytes[j] >> 4);
      }
      sums[row * TILE + output] = total;
    }
  }
#endif
}

struct Product {
  const uint8_t *codes, *packed;
  const int32_t *totals, *offset;
  const float *scale, *constant;
  int64_t width, outputs;
};

// Multiply ROWS rows, starting at `row`, by TILE outputs, starting at `output`. Outputs after the last one are dropped.
template <typename scalar_t, int ROWS>
void multiply_rows(const Product& product, int64_t output, int64_t row, scalar_t* to) {
  int32_t sums[ROWS * TILE];
  const uint8_t* packed = product.packed + output * (product.width / 2);
  multiply_tile<ROWS>(product.codes + row * product.width, product.width, packed, sums);
  for (int64_t j = 0; j < ROWS; ++j) {
    auto write = [&](int64_t count) {
      for (int64_t i = 0; i < count; ++i) {
        const int32_t exact = sums[j * TILE + i] - product.totals[row + j] - product.offset[output + i];
        const float value = static_cast<float>(exact) * product.scale[output + i] + product.constant[output + i];
        round_to(value, to + (row + j) * product.outputs + output + i);
      }
    };
    if (output + TILE <= product.outputs)
      write(TILE);
    else
      write(product.outputs - output);
  }
}

template <typename scalar_t>
void multiply_all_rows(const Product& product, int64_t output, int64_t rows, scalar_t* to) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) multiply_rows<scalar_t, 4>(product, output, row, to);
  if (rows - row >= 2) {
    multiply_rows<scalar_t, 2>(product, output, row, to);
    row += 2;
  }
  if (row < rows) multiply_rows<scalar_t, 1>(product, output, row, to);
}

at::Tensor nibble_product(const at::Tensor& codes, const at::Tensor& packed, const at::Tensor& scale,
                          const at::Tensor& offset, const at::Tensor& constant, at::ScalarType dtype) {
  TORCH_CHECK(codes.dim() >= 1 && codes.size(-1) >= 1 && packed.dim() == 2 && packed.is_contiguous());
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16, "expected float32 or bfloat16, got ", dtype);
  const int64_t outputs = scale.numel(), width = 2 * packed.size(1), inputs = codes.size(-1);
  const int64_t rows = codes.numel() / inputs;
  TORCH_CHECK(packed.size(0) == (outputs + TILE - 1) / TILE * TILE, "packed weights of ", packed.size(0),
              " outputs for scales of ", outputs);
  TORCH_CHECK(width == (inputs + 2 * PAIRED - 1) / (2 * PAIRED) * (2 * PAIRED), "codes of ", inputs,
              " inputs for packed weights of ", width);
  TORCH_CHECK(offset.is_contiguous() && offset.numel() == outputs, "offset needs ", outputs, " values");
  at::Tensor input = codes.contiguous();
  if (inputs != width) {
    at::Tensor padded = at::empty({rows, width}, input.options());
    for (int64_t row = 0; row < rows; ++row) {
      uint8_t* to = padded.data_ptr<uint8_t>() + row * width;
      std::memcpy(to, input.const_data_ptr<uint8_t>() + row * inputs, inputs);
      std::memset(to + inputs, 0, width - inputs);
    }
    input = padded;
  }
  std::vector<int32_t> totals(rows);
  const uint8_t* bytes = input.const_data_ptr<uint8_t>();
  for (int64_t row = 0; row < rows; ++row) {
    int32_t total = 0;
    for (int64_t i = 0; i < width; ++i) total += bytes[row * width + i];
    totals[row] = 8 * total;
  }
  auto shape = codes.sizes().vec();
  shape.back() = outputs;
  at::Tensor result = at::empty(shape, codes.options().dtype(dtype));
  const Product product{bytes,
                        packed.const_data_ptr<uint8_t>(),
                        totals.data(),
                        offset.const_data_ptr<int32_t>(),
                        read_values(scale, outputs, "scale"),
                        read_values(constant, outputs, "constant"),
                        width,
                        outputs};
  auto run = [&](auto* to) {
    const int64_t tiles = (outputs + TILE - 1) / TILE;
    at::parallel_for(0, tiles, std::max<int64_t>(1, 2 * GRAIN / width), [&](int64_t first, int64_t last) {
      for (int64_t tile = first; tile < last; ++tile) multiply_all_rows(product, tile * TILE, rows, to);
    });
  };
  if (dtype == at::kBFloat16)
    run(result.data_ptr<at::BFloat16>());
  else
    run(result.data_ptr<float>());
  return result;
}

// Use vLLM's oneDNN kernel (`handler`) for more than `few` rows. It holds the same weights in its own layout and sums
// exactly, too, but takes the constant in `dtype` (`bias`). Its codes are int8: code - `signed_offset`, which is 0 for
// codes below 128 and 128 for others.
at::Tensor served_product(const at::Tensor& codes, const at::Tensor& packed, const at::Tensor& scale,
                          const at::Tensor& offset, const at::Tensor& constant, at::ScalarType dtype, int64_t few,
                          int64_t signed_offset, const at::Tensor& input_scale, const at::Tensor& input_zero_point,
                          const at::Tensor& bias, const at::Tensor& handler) {
  if (codes.size(0) <= few) return nibble_product(codes, packed, scale, offset, constant, dtype);
  using Optional = const std::optional<at::Tensor>&;
  static const auto multiply =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("_C::onednn_scaled_mm", "")
          .typed<void(at::Tensor&, const at::Tensor&, const at::Tensor&, Optional, Optional, Optional,
                      const at::Tensor&)>();
  TORCH_CHECK(signed_offset == 0 || signed_offset == 128, "signed_offset=", signed_offset, " is not 0 or 128");
  const at::Tensor input = codes.contiguous();
  at::Tensor centered;
  if (signed_offset == 0) {
    centered = input.view(at::kChar);
  } else {
    centered = at::empty(input.sizes(), input.options().dtype(at::kChar));
    const uint8_t* from = input.const_data_ptr<uint8_t>();
    int8_t* to = centered.data_ptr<int8_t>();
    at::parallel_for(0, input.numel(), GRAIN, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) to[i] = static_cast<int8_t>(from[i] ^ 128);
    });
  }
  at::Tensor result = at::empty({input.size(0), scale.size(0)}, codes.options().dtype(dtype));
  multiply.call(result, centered, input_scale, input_zero_point, std::nullopt, bias, handler);
  return result;
}

TORCH_LIBRARY_FRAGMENT(prefixquant, library) {
  library.def(
      "rotated_codes(Tensor x, Tensor[] paley, int sylvester, Tensor shift, float scale, int zero_point, int largest) "
      "-> Tensor");
  library.def("row_codes(Tensor x, Tensor[] paley, int sylvester) -> (Tensor, Tensor)");
  library.def(
      "cached_keys(Tensor keys, Tensor positions, Tensor? table, Tensor? mean, Tensor scale, Tensor? zero_point, "
      "int sylvester, int lowest, int highest) -> Tensor");
  library.def(
      "pack_states(Tensor x, int bits, int lowest, Tensor scale, Tensor? zero_point, Tensor? shift) -> Tensor");
  library.def(
      "unpack_states(Tensor(a!) out, Tensor packed, int first, int bits, int lowest, Tensor scale, Tensor? zero_point, "
      "Tensor? shift, Tensor? matrix, Tensor? mean, Tensor? places, Tensor? table) -> ()");
  library.def(
      "key_codes(Tensor keys, Tensor positions, Tensor? table, Tensor? mean, Tensor scale, Tensor? zero_point, "
      "int sylvester, int lowest, int bits) -> Tensor");
  library.def(
      "attend_codes(Tensor(a!) out, Tensor queries, Tensor key_codes, Tensor value_codes, Tensor pages, Tensor starts, "
      "Tensor lengths, int key_bits, Tensor key_scale, Tensor key_offset, Tensor? key_levels, int value_bits, "
      "Tensor value_scale, Tensor value_offset, Tensor? value_levels, Tensor? turn, Tensor? mean, Tensor? table, "
      "Tensor? prefix, Tensor? sinks, float scale, int window) -> ()");
  library.def("store_codes(Tensor(a!) cache, Tensor codes, Tensor places) -> ()");
  library.def(
      "nibble_product(Tensor codes, Tensor packed, Tensor scale, Tensor offset, Tensor constant, ScalarType dtype) "
      "-> Tensor");
  library.def(
      "served_product(Tensor codes, Tensor packed, Tensor scale, Tensor offset, Tensor constant, ScalarType dtype, "
      "int few, int signed_offset, Tensor input_scale, Tensor input_zero_point, Tensor bias, Tensor handler) -> Tensor");
}

TORCH_LIBRARY_IMPL(prefixquant, CPU, library) {
  library.impl("rotated_codes", &rotated_codes);
  library.impl("row_codes", &row_codes);
  library.impl("cached_keys", &cached_keys);
  library.impl("pack_states", &pack_states);
  library.impl("unpack_states", &unpack_states);
  library.impl("key_codes", &key_codes);
  library.impl("attend_codes", &attend_codes);
  library.impl("store_codes", &store_codes);
  library.impl("nibble_product", &nibble_product);
  library.impl("served_product", &served_product);
}

}  // namespace
