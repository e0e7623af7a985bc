// A picture resized as Pillow resizes it, cut out and normalised, in one call.
//
// Pillow's arithmetic, bit by bit: weights of 22 binary places, along the rows first, rounded to 8 bits, then along the
// columns; or the other way round, as newer versions do where the height shrinks more. Only what the cut keeps is
// computed. Reference: ImagingResample of Pillow (libImaging/Resample.c), 8 bits a channel.
#ifdef __clang__  // a fused multiply and add would round the weights otherwise than Pillow does
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define WIDE 1
#endif

namespace {

constexpr int PLACES = 22;

double bilinear(double x) {
  x = std::fabs(x);
  return x < 1.0 ? 1.0 - x : 0.0;
}

double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::fabs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

// Which of `from` pixels each of `count` of `to` pixels is made of, from pixel `first` on, and by what weights.
struct Weights {
  int64_t length = 0;
  std::vector<int64_t> starts, counts;
  std::vector<int32_t> values;  // [count, length]

  Weights(int64_t from, int64_t to, int64_t first, int64_t count, int32_t kind) {
    const double scale = double(from) / double(to);
    const double stretch = std::max(scale, 1.0);
    const double support = (kind ? 2.0 : 1.0) * stretch;
    length = int64_t(std::ceil(support)) * 2 + 1;
    length = (length + 3) / 4 * 4;
    values.assign(count * length, 0);
    std::vector<double> exact(length);
    for (int64_t i = 0; i < count; i++) {
      const double centre = (double(first + i) + 0.5) * scale;
      const double inverse = 1.0 / stretch;
      const int64_t low = std::max<int64_t>(int64_t(centre - support + 0.5), 0);
      const int64_t high = std::min<int64_t>(int64_t(centre + support + 0.5), from);
      double total = 0.0;
      for (int64_t x = 0; x < high - low; x++) {
        const double at = (double(x + low) - centre + 0.5) * inverse;
        exact[x] = kind ? bicubic(at) : bilinear(at);
        total += exact[x];
      }
      for (int64_t x = 0; x < high - low; x++) {
        const double share = (total != 0.0 ? exact[x] / total : exact[x]) * (1 << PLACES);
        values[i * length + x] = int32_t(share < 0 ? -0.5 + share : 0.5 + share);
      }
      starts.push_back(low);
      counts.push_back(high - low);
    }
  }
};

inline uint8_t clipped(int32_t sum) { return uint8_t(std::clamp(sum >> PLACES, 0, 255)); }

// One row of pixels of four bytes → `out`, as many pixels as there are weights.
void across(const uint8_t* row, const Weights& w, const int32_t* spread, uint8_t* out) {
  const int64_t count = int64_t(w.starts.size());
#ifdef WIDE
  const __m128i half = _mm_set1_epi32(1 << (PLACES - 1));
  for (int64_t i = 0; i < count; i++) {
    const uint8_t* from = row + 4 * w.starts[i];
    const int32_t* k = spread + 4 * i * w.length;
    __m512i sum = _mm512_setzero_si512();
    for (int64_t t = 0; t < w.counts[i]; t += 4) {  // four pixels of four bytes
      const __mmask16 some = w.counts[i] - t >= 4 ? 0xffff : (1u << (4 * (w.counts[i] - t))) - 1;
      const __m512i x = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(some, from + 4 * t));
      sum = _mm512_add_epi32(sum, _mm512_mullo_epi32(x, _mm512_loadu_si512(k + 4 * t)));
    }
    const __m256i two = _mm256_add_epi32(_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64(sum, 1));
    __m128i one = _mm_add_epi32(_mm256_castsi256_si128(two), _mm256_extracti128_si256(two, 1));
    one = _mm_srai_epi32(_mm_add_epi32(one, half), PLACES);
    one = _mm_packus_epi16(_mm_packs_epi32(one, one), one);
    *(int32_t*)(out + 4 * i) = _mm_cvtsi128_si32(one);
  }
#else
  for (int64_t i = 0; i < count; i++)
    for (int c = 0; c < 4; c++) {
      int32_t sum = 1 << (PLACES - 1);
      for (int64_t t = 0; t < w.counts[i]; t++)
        sum += row[4 * (w.starts[i] + t) + c] * w.values[i * w.length + t];
      out[4 * i + c] = clipped(sum);
    }
#endif
}

// The sum of some rows of `count` bytes, `step` apart → `out`.
void down(const uint8_t* from, int64_t step, int64_t count, const int32_t* weights, int64_t taps, int32_t* sums,
          uint8_t* out) {
  std::fill(sums, sums + count, 1 << (PLACES - 1));
  for (int64_t t = 0; t < taps; t++) {
    const uint8_t* row = from + t * step;
    const int32_t k = weights[t];
#pragma omp simd
    for (int64_t i = 0; i < count; i++) sums[i] += row[i] * k;
  }
#pragma omp simd
  for (int64_t i = 0; i < count; i++) out[i] = clipped(sums[i]);
}

}  // namespace

extern "C" {

// `pixels [height, width, 4]` bytes, resized to `high` x `wide`, of which the part of `rows` x `columns` at (`top`,
// `left`) is looked up in `table [3, 256]` → `out [3, rows, columns]`. `kind`: 0 bilinear, 1 bicubic.
void chiasm_picture(const uint8_t* pixels, int64_t height, int64_t width, int64_t high, int64_t wide, int64_t top,
                    int64_t left, int64_t rows, int64_t columns, int32_t kind, int32_t columns_first,
                    const float* table, float* out) {
  Weights x(width, wide, left, columns, kind), y(height, high, top, rows, kind);
  std::vector<int32_t> spread(4 * columns * x.length);  // each weight four times, one for each byte of its pixel
  for (int64_t i = 0; i < columns * x.length; i++)
    for (int c = 0; c < 4; c++) spread[4 * i + c] = x.values[i];
  const int64_t above = y.starts.front(), below = y.starts.back() + y.counts.back();
  const int64_t from = x.starts.front(), until = x.starts.back() + x.counts.back();
  std::vector<uint8_t> line(4 * columns), middle(columns_first ? 4 * (until - from) : 4 * columns * (below - above));
  std::vector<int32_t> sums(4 * std::max(columns, until - from));
  if (columns_first)
    for (auto& start : x.starts) start -= from;
  else
    for (int64_t row = above; row < below; row++)
      across(pixels + 4 * row * width, x, spread.data(), middle.data() + 4 * (row - above) * columns);
  for (int64_t row = 0; row < rows; row++) {
    const int32_t* weights = y.values.data() + row * y.length;
    if (columns_first) {
      down(pixels + 4 * (y.starts[row] * width + from), 4 * width, 4 * (until - from), weights, y.counts[row],
           sums.data(), middle.data());
      across(middle.data(), x, spread.data(), line.data());
    } else {
      down(middle.data() + 4 * (y.starts[row] - above) * columns, 4 * columns, 4 * columns, weights, y.counts[row],
           sums.data(), line.data());
    }
    for (int c = 0; c < 3; c++) {
      float* to = out + (c * rows + row) * columns;
      for (int64_t i = 0; i < columns; i++) to[i] = table[256 * c + line[4 * i + c]];
    }
  }
}
}
