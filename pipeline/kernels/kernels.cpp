// Operators that do in one pass over the activations what takes torch many operators. The Python module that calls an
// operator says what it computes and explains its arguments.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
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

// Sylvester's matrix of order LANES, with entries 1 and -1.
struct Sylvester {
  float rows[LANES][LANES];
  Sylvester() {
    for (int i = 0; i < LANES; ++i)
      for (int j = 0; j < LANES; ++j) rows[i][j] = __builtin_popcount(i & j) % 2 ? -1.f : 1.f;
  }
};
const Sylvester SYLVESTER;

// Multiply each of COUNT groups of LANES values by Sylvester's matrix of order LANES, in place.
template <int COUNT>
void transform_lanes(float* values) {
  Lanes sums[COUNT] = {};
  for (int64_t i = 0; i < LANES; ++i) {
    const Lanes row = load(SYLVESTER.rows[i]);
    for (int place = 0; place < COUNT; ++place) sums[place] += values[place * LANES + i] * row;
  }
  for (int place = 0; place < COUNT; ++place) store(values + place * LANES, sums[place]);
}

// Multiply each group of `order` values of values[width] by Sylvester's matrix of that order, in place.
void transform_sylvester(float* values, int64_t width, int64_t order) {
  int64_t step = 1;
  if (order >= LANES) {
    constexpr int TOGETHER = 8;  // independent sums, which run in parallel
    int64_t start = 0;
    for (; start + TOGETHER * LANES <= width; start += TOGETHER * LANES) transform_lanes<TOGETHER>(values + start);
    for (; start < width; start += LANES) transform_lanes<1>(values + start);
    step = LANES;
  }
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

// A Hadamard matrix: the Kronecker product of Paley's matrices, [order, order] each, and Sylvester's of order
// `sylvester`.
struct Transform {
  std::vector<const float*> paley;
  std::vector<int64_t> orders;
  int64_t sylvester, order;

  Transform(const std::vector<at::Tensor>& matrices, int64_t power) : sylvester(power), order(power) {
    TORCH_CHECK(power >= 1 && (power & (power - 1)) == 0, "sylvester=", power, " is not a power of two");
    for (const at::Tensor& matrix : matrices) {
      TORCH_CHECK(matrix.dim() == 2 && matrix.size(0) == matrix.size(1) && matrix.size(0) % 4 == 0 &&
                      matrix.is_contiguous(),
                  "a Paley matrix must be square, contiguous, and of an order that is a multiple of 4");
      paley.push_back(matrix.data_ptr<float>());
      orders.push_back(matrix.size(0));
      order *= matrix.size(0);
    }
  }

  // Multiply values[order] by the matrix. Returns where the result is, in `values` or in `other`.
  float* apply(float* values, float* other) const {
    if (sylvester > 1) transform_sylvester(values, order, sylvester);
    int64_t width = sylvester;
    for (int64_t place = static_cast<int64_t>(paley.size()) - 1; place >= 0; --place) {
      const int64_t size = orders[place] * width;
      for (int64_t start = 0; start < order; start += size)
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

// ---- Keys -----------------------------------------------------------------------------------------------------------

at::Tensor cached_keys(const at::Tensor& keys, const at::Tensor& positions, const std::optional<at::Tensor>& table,
                       const std::optional<at::Tensor>& mean, const at::Tensor& scale,
                       const std::optional<at::Tensor>& zero_point, int64_t sylvester, int64_t lowest,
                       int64_t highest) {
  check_values(keys);
  TORCH_CHECK(keys.dim() == 2 && scale.numel() >= 1 && keys.size(1) % scale.numel() == 0,
              "the width of the keys is not a multiple of the number of scales (one per head)");
  const at::Tensor input = keys.contiguous(), row_positions = positions.contiguous();
  const int64_t heads = scale.numel(), width = input.size(1) / heads, half = width / 2, rows = input.size(0);
  TORCH_CHECK(Transform({}, sylvester).order == sylvester && width % sylvester == 0, "sylvester=", sylvester,
              " does not divide head_dim=", width);
  const float* scales = read_values(scale, heads, "scale");
  const float* zeros = zero_point ? read_values(*zero_point, heads, "zero_point") : nullptr;
  const float* means = mean ? read_values(*mean, heads * width, "mean") : nullptr;
  TORCH_CHECK(!means || table, "a mean needs a table of cosines and sines");
  const at::Tensor turns = means ? table->contiguous() : input;
  const int64_t* position = row_positions.const_data_ptr<int64_t>();
  if (means) {
    TORCH_CHECK(turns.dim() == 2 && turns.size(1) == width && turns.scalar_type() == input.scalar_type(),
                "the table needs [positions, head_dim] cosines and sines in the dtype of the keys");
    TORCH_CHECK(row_positions.numel() == rows, "expected one position per row");
    for (int64_t row = 0; row < rows; ++row)
      TORCH_CHECK(position[row] >= 0 && position[row] < turns.size(0), "position ", position[row],
                  " is outside a table of ", turns.size(0));
  }
  at::Tensor result = at::empty_like(input);
  const float norm = static_cast<float>(1 / std::sqrt(static_cast<double>(sylvester)));
  auto run = [&](const auto* from, auto* to) {
    using scalar_t = std::decay_t<decltype(*to)>;
    const scalar_t* cosines = turns.const_data_ptr<scalar_t>();
    at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / (heads * width)), [&](int64_t first, int64_t last) {
      std::vector<float> buffer(width), constant(width, 0.f);
      for (int64_t row = first; row < last; ++row) {
        const scalar_t* cosine = means ? cosines + position[row] * width : cosines;
        const scalar_t* sine = cosine + half;
        for (int64_t head = 0; head < heads; ++head) {
          const scalar_t* key = from + (row * heads + head) * width;
          scalar_t* target = to + (row * heads + head) * width;
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
          const float factor = scales[head], zero = zeros ? zeros[head] : 0.f;
          transform_sylvester(values, width, sylvester);
          for (int64_t i = 0; i < width; ++i) {
            const float code = std::nearbyint(values[i] * norm / factor) + zero;
            values[i] = (std::min(std::max(code, static_cast<float>(lowest)), static_cast<float>(highest)) - zero) *
                        factor * norm;
          }
          transform_sylvester(values, width, sylvester);
          for (int64_t i = 0; i < width; ++i) round_to(values[i] + constant[i], target + i);
        }
      }
    });
  };
  if (input.scalar_type() == at::kBFloat16)
    run(input.const_data_ptr<at::BFloat16>(), result.data_ptr<at::BFloat16>());
  else
    run(input.const_data_ptr<float>(), result.data_ptr<float>());
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
  float lowest, highest, zero, scale;
  const float* shift;  // [width], or null
};

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
// exactly, too, but rounds to `dtype` before the constant is added.
at::Tensor served_product(const at::Tensor& codes, const at::Tensor& packed, const at::Tensor& scale,
                          const at::Tensor& offset, const at::Tensor& constant, at::ScalarType dtype, int64_t few,
                          const at::Tensor& input_scale, const at::Tensor& input_zero_point,
                          const at::Tensor& handler) {
  if (codes.size(0) <= few) return nibble_product(codes, packed, scale, offset, constant, dtype);
  using Optional = const std::optional<at::Tensor>&;
  static const auto multiply =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("_C::onednn_scaled_mm", "")
          .typed<void(at::Tensor&, const at::Tensor&, const at::Tensor&, Optional, Optional, Optional,
                      const at::Tensor&)>();
  const at::Tensor input = codes.contiguous();
  const int64_t rows = input.size(0), width = input.size(1), outputs = scale.size(0);
  at::Tensor centered = at::empty(input.sizes(), input.options().dtype(at::kChar));  // code - 128
  const uint8_t* from = input.const_data_ptr<uint8_t>();
  int8_t* to = centered.data_ptr<int8_t>();
  at::parallel_for(0, rows * width, GRAIN, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) to[i] = static_cast<int8_t>(from[i] ^ 128);
  });
  at::Tensor result = at::empty({rows, outputs}, codes.options().dtype(dtype));
  multiply.call(result, centered, input_scale, input_zero_point, std::nullopt, std::nullopt, handler);
  const float* constants = read_values(constant, outputs, "constant");
  auto add = [&](auto* values) {
    at::parallel_for(0, rows, std::max<int64_t>(1, GRAIN / outputs), [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row)
        for (int64_t i = 0; i < outputs; ++i) {
          auto* value = values + row * outputs + i;
          round_to(static_cast<float>(*value) + constants[i], value);
        }
    });
  };
  if (dtype == at::kBFloat16)
    add(result.data_ptr<at::BFloat16>());
  else
    add(result.data_ptr<float>());
  return result;
}

TORCH_LIBRARY_FRAGMENT(prefixquant, library) {
  library.def(
      "rotated_codes(Tensor x, Tensor[] paley, int sylvester, Tensor shift, float scale, int zero_point, int largest) "
      "-> Tensor");
  library.def(
      "cached_keys(Tensor keys, Tensor positions, Tensor? table, Tensor? mean, Tensor scale, Tensor? zero_point, "
      "int sylvester, int lowest, int highest) -> Tensor");
  library.def(
      "pack_states(Tensor x, int bits, int lowest, Tensor scale, Tensor? zero_point, Tensor? shift) -> Tensor");
  library.def(
      "unpack_states(Tensor(a!) out, Tensor packed, int first, int bits, int lowest, Tensor scale, Tensor? zero_point, "
      "Tensor? shift, Tensor? matrix, Tensor? mean, Tensor? places, Tensor? table) -> ()");
  library.def(
      "nibble_product(Tensor codes, Tensor packed, Tensor scale, Tensor offset, Tensor constant, ScalarType dtype) "
      "-> Tensor");
  library.def(
      "served_product(Tensor codes, Tensor packed, Tensor scale, Tensor offset, Tensor constant, ScalarType dtype, "
      "int few, Tensor input_scale, Tensor input_zero_point, Tensor handler) -> Tensor");
}

TORCH_LIBRARY_IMPL(prefixquant, CPU, library) {
  library.impl("rotated_codes", &rotated_codes);
  library.impl("cached_keys", &cached_keys);
  library.impl("pack_states", &pack_states);
  library.impl("unpack_states", &unpack_states);
  library.impl("nibble_product", &nibble_product);
  library.impl("served_product", &served_product);
}

}  // namespace
