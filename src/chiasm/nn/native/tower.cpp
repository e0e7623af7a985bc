// What stands between the matrix products of a tower in bfloat16: attention among a few hundred positions, norms, and
// the activation of the perceptron. Each walks through memory once; sums, softmax and activations are float32.
//
// Only for processors with AVX-512 and its bfloat16 products; elsewhere the library says that it has nothing.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "exp.h"
#include "numbers.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512BF16__)
#define TOWER 1

namespace {

constexpr float LOG2E = 1.44269504f;
constexpr int ROWS = 4;  // queries whose sums are in registers together

inline __m512 wide(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

// One head of one sequence. `step`: numbers from one position to the next.
struct Head {
  int64_t length, width, step;
  int64_t places, pairs, columns;  // keys in groups of 32, pairs of keys, width in groups of 32
  std::vector<uint32_t> keys, values, shares, query;
  std::vector<float> scores;

  void shape(int64_t n, int64_t w, int64_t between) {
    length = n, width = w, step = between;
    places = (n + 31) / 32 * 32;
    pairs = places / 2;
    columns = (w + 31) / 32 * 32;
    keys.assign(width / 2 * places, 0);
    values.assign(pairs * columns, 0);
    shares.assign(ROWS * pairs, 0);
    scores.assign(ROWS * places, 0);
  }

  // Keys as [width / 2, places] pairs of neighbouring numbers, values as [pairs, columns] pairs of neighbouring rows.
  void pack(const uint16_t* k, const uint16_t* v) {
    for (int64_t i = 0; i < length; i++) {
      const uint32_t* row = (const uint32_t*)(k + i * step);
      for (int64_t c = 0; c < width / 2; c++) keys[c * places + i] = row[c];
    }
    for (int64_t i = 0; i < length; i += 2) {
      const uint16_t *even = v + i * step, *odd = even + step;
      uint32_t* to = values.data() + i / 2 * columns;
      const bool both = i + 1 < length;
      for (int64_t c = 0; c < width; c++) to[c] = even[c] | (both ? uint32_t(odd[c]) << 16 : 0);
    }
  }

  void fetch(const uint16_t* x) const {
    for (int64_t c = 0; c < width; c += 32) _mm_prefetch((const char*)(x + c), _MM_HINT_T1);
  }

  void score(const uint32_t* const* q, int64_t seen) {
    for (int64_t j = 0; j < seen; j += 32) {
      __m512 sums[ROWS][2] = {};
      for (int64_t c = 0; c < width / 2; c++) {
        const __m512bh a = (__m512bh)_mm512_loadu_si512(keys.data() + c * places + j);
        const __m512bh b = (__m512bh)_mm512_loadu_si512(keys.data() + c * places + j + 16);
        UNROLLED for (int r = 0; r < ROWS; r++) {
          const __m512bh x = (__m512bh)_mm512_set1_epi32(q[r][c]);
          sums[r][0] = _mm512_dpbf16_ps(sums[r][0], a, x);
          sums[r][1] = _mm512_dpbf16_ps(sums[r][1], b, x);
        }
      }
      UNROLLED for (int r = 0; r < ROWS; r++) {
        _mm512_storeu_ps(scores.data() + r * places + j, sums[r][0]);
        _mm512_storeu_ps(scores.data() + r * places + j + 16, sums[r][1]);
      }
    }
  }

  // 2^(scale · (score - highest)) of each query as bfloat16, and the inverse of its sum; 0 where it may see nothing.
  // Query `r` sees the first `own[r]` keys. The queries are taken side by side: none waits for its own sums.
  void soften(const int64_t* own, int64_t seen, const uint8_t* mask, float scale, float* inverse) {
    __m512 most[ROWS], totals[ROWS];
    UNROLLED for (int r = 0; r < ROWS; r++) most[r] = _mm512_set1_ps(-INFINITY), totals[r] = _mm512_setzero_ps();
    for (int64_t j = 0; j < seen; j += 16)
      UNROLLED for (int r = 0; r < ROWS; r++)
        most[r] = _mm512_mask_max_ps(most[r], visible(j, own[r], mask), most[r],
                                     _mm512_loadu_ps(scores.data() + r * places + j));
    UNROLLED for (int r = 0; r < ROWS; r++) most[r] = _mm512_set1_ps(_mm512_reduce_max_ps(most[r]) * scale);
    for (int64_t j = 0; j < seen; j += 16)
      UNROLLED for (int r = 0; r < ROWS; r++) {
        const __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(scores.data() + r * places + j), _mm512_set1_ps(scale), most[r]);
        const __m512 e = _mm512_maskz_mov_ps(visible(j, own[r], mask), power16(x));
        totals[r] = _mm512_add_ps(totals[r], e);
        _mm256_storeu_si256((__m256i*)((uint16_t*)(shares.data() + r * pairs) + j), narrow(e));
      }
    UNROLLED for (int r = 0; r < ROWS; r++) {
      const float total = _mm512_reduce_add_ps(totals[r]);
      inverse[r] = total == 0 ? 0.0f : 1.0f / total;
    }
  }

  static __mmask16 visible(int64_t j, int64_t own, const uint8_t* mask) {
    __mmask16 some = own - j >= 16 ? 0xffff : own > j ? (1u << (own - j)) - 1 : 0;
    if (mask) [[unlikely]]
      for (int i = 0; i < 16 && j + i < own; i++)
        if (!mask[j + i]) some &= ~(1u << i);
    return some;
  }

  void mix(int64_t seen, const float* inverse, uint16_t* const* out, int rows) {
    for (int64_t c = 0; c < width; c += 32) {
      __m512 sums[ROWS][2] = {};
      for (int64_t p = 0; p < (seen + 1) / 2; p++) {
        const __m512bh a = (__m512bh)_mm512_loadu_si512(values.data() + p * columns + c);
        const __m512bh b = (__m512bh)_mm512_loadu_si512(values.data() + p * columns + c + 16);
        UNROLLED for (int r = 0; r < ROWS; r++) {
          const __m512bh x = (__m512bh)_mm512_set1_epi32(shares[r * pairs + p]);
          sums[r][0] = _mm512_dpbf16_ps(sums[r][0], a, x);
          sums[r][1] = _mm512_dpbf16_ps(sums[r][1], b, x);
        }
      }
      for (int r = 0; r < rows; r++)
        for (int half = 0; half < 2; half++) {
          const int64_t left = width - c - 16 * half;
          if (left <= 0) continue;
          const __mmask16 some = left >= 16 ? 0xffff : (1u << left) - 1;
          _mm256_mask_storeu_epi16(out[r] + c + 16 * half, some,
                                   narrow(_mm512_mul_ps(sums[r][half], _mm512_set1_ps(inverse[r]))));
        }
    }
  }

  void run(const uint16_t* q, const uint8_t* mask, bool causal, uint16_t* out) {
    const float scale = LOG2E / std::sqrt(float(width));
    for (int64_t first = 0; first < length; first += ROWS) {
      const int rows = int(std::min<int64_t>(ROWS, length - first));
      const uint32_t* asked[ROWS];
      uint16_t* to[ROWS];
      float inverse[ROWS];
      int64_t own[ROWS];
      for (int r = 0; r < ROWS; r++) {
        const int64_t row = first + std::min(r, rows - 1);
        own[r] = causal ? row + 1 : length;
        asked[r] = (const uint32_t*)(q + row * step);
        to[r] = out + row * step;
      }
      const int64_t seen = causal ? first + rows : length;
      score(asked, seen);
      soften(own, (seen + 15) / 16 * 16, mask, scale, inverse);
      mix(seen, inverse, to, rows);
    }
  }
};

enum Activation : int32_t { QUICK_GELU = 0, GELU_TANH = 1, SILU = 2 };

// x / (1 + 2^-y), by an estimate of the inverse and a step of Newton's.
inline __m512 gated(__m512 x, __m512 y) {
  const __m512 bounded = _mm512_min_ps(_mm512_set1_ps(125.0f), _mm512_sub_ps(_mm512_setzero_ps(), y));
  const __m512 sum = _mm512_add_ps(_mm512_set1_ps(1.0f), power16(bounded)), near = _mm512_rcp14_ps(sum);
  const __mmask16 some = _mm512_cmp_ps_mask(y, _mm512_set1_ps(-125.0f), _CMP_NLT_UQ);  // below, nothing is left of x
  return _mm512_maskz_mul_ps(some, x, _mm512_mul_ps(near, _mm512_fnmadd_ps(sum, near, _mm512_set1_ps(2.0f))));
}

// tanh(y) = 2 sigmoid(2 y) - 1, so that GELU's approximation is x · sigmoid(1.5957691 (x + 0.044715 x³)).
inline __m512 activated(__m512 x, int32_t kind) {
  if (kind == QUICK_GELU) return gated(x, _mm512_mul_ps(x, _mm512_set1_ps(1.702f * LOG2E)));
  if (kind == SILU) return gated(x, _mm512_mul_ps(x, _mm512_set1_ps(LOG2E)));
  const __m512 inner = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_mul_ps(x, x), x), _mm512_set1_ps(0.044715f), x);
  return gated(x, _mm512_mul_ps(inner, _mm512_set1_ps(1.5957691216f * LOG2E)));
}

// The sum of `of(x)` over the numbers of a row.
template <class Of>
inline float summed(const uint16_t* x, int64_t count, Of of) {
  __m512 sums[2] = {};
  int64_t i = 0;
  for (; i + 32 <= count; i += 32)
    UNROLLED for (int h = 0; h < 2; h++)
      sums[h] = _mm512_add_ps(sums[h], of(wide(_mm256_loadu_si256((const __m256i*)(x + i + 16 * h)))));
  for (; i < count; i += 16) {
    const __mmask16 some = count - i >= 16 ? 0xffff : (1u << (count - i)) - 1;
    sums[0] = _mm512_mask_add_ps(sums[0], some, sums[0], of(wide(_mm256_maskz_loadu_epi16(some, x + i))));
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
}

void normed(const uint16_t* x, const float* weight, const float* bias, uint16_t* out, int64_t count, float eps) {
  const __m512 mean = _mm512_set1_ps(summed(x, count, [](__m512 v) { return v; }) / count);
  const float spread = summed(x, count, [&](__m512 v) {
    const __m512 off = _mm512_sub_ps(v, mean);
    return _mm512_mul_ps(off, off);
  });
  const __m512 inverse = _mm512_set1_ps(1.0f / std::sqrt(spread / count + eps));
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 some = count - i >= 16 ? 0xffff : (1u << (count - i)) - 1;
    const __m512 unit = _mm512_mul_ps(_mm512_sub_ps(wide(_mm256_maskz_loadu_epi16(some, x + i)), mean), inverse);
    const __m512 y = _mm512_fmadd_ps(unit, _mm512_maskz_loadu_ps(some, weight + i), _mm512_maskz_loadu_ps(some, bias + i));
    if (some == 0xffff)
      _mm256_storeu_si256((__m256i*)(out + i), narrow(y));
    else
      _mm256_mask_storeu_epi16(out + i, some, narrow(y));
  }
}

}  // namespace
#endif

extern "C" {

int32_t chiasm_has_tower() {
#ifdef TOWER
  return 1;
#else
  return 0;
#endif
}

#ifdef TOWER
// `q`, `k`, `v`, `out` `[batch, length, heads · width]` of bfloat16, `width` even; `mask [batch, length]` or null.
void chiasm_attention(const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* out, const uint8_t* mask,
                      int64_t batch, int64_t length, int64_t heads, int64_t width, int32_t causal, int32_t threads) {
#pragma omp parallel num_threads(threads)
  {
    Head head;
    head.shape(length, width, heads * width);
#pragma omp for
    for (int64_t i = 0; i < batch * heads; i++) {
      const int64_t start = i / heads * length * heads * width + i % heads * width;
      head.pack(k + start, v + start);
      for (const uint16_t* x : {q, k, v})  // the next head's numbers come while this one is computed
        for (int64_t row = 0; row < length; row++) head.fetch(x + start + width + row * heads * width);
      head.run(q + start, mask ? mask + i / heads * length : nullptr, causal, out + start);
    }
  }
}

// `x`, `out` `[rows, dim]` of bfloat16, `weight`, `bias` `[dim]` of bfloat16.
void chiasm_layer_norm(const uint16_t* x, const uint16_t* weight, const uint16_t* bias, uint16_t* out, int64_t rows,
                       int64_t dim, float eps, int32_t threads) {
  std::vector<float> by(dim), plus(dim);
  for (int64_t i = 0; i < dim; i++) by[i] = widened(weight[i]), plus[i] = widened(bias[i]);
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < rows; row++)
    normed(x + row * dim, by.data(), plus.data(), out + row * dim, dim, eps);
}

// `x [count]` of bfloat16, in its place.
void chiasm_activate(uint16_t* x, int64_t count, int32_t kind, int32_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t start = 0; start < count; start += 4096) {
    const int64_t end = std::min(start + 4096, count);
    int64_t i = start;
    for (; i + 16 <= end; i += 16) {
      __m256i* at = (__m256i*)(x + i);
      _mm256_storeu_si256(at, narrow(activated(wide(_mm256_loadu_si256(at)), kind)));
    }
    if (i < end) {
      const __mmask16 some = (1u << (end - i)) - 1;
      _mm256_mask_storeu_epi16(x + i, some, narrow(activated(wide(_mm256_maskz_loadu_epi16(some, x + i)), kind)));
    }
  }
}
#endif
}
