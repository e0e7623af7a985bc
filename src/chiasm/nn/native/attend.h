// Attention of a few queries that read the same keys and values: the heads of a group, at one position or some.
//
// Positions are taken 16 at a time, counted from the slot's first, so what is summed in which order depends on the query
// alone, not on those beside it.
#pragma once
#include "exp.h"
#include "matrix.h"

struct Query {
  const float* q;      // [width]
  float* out;          // [width]
  float* shares;       // room for as many positions as a slot has, and 16 more
  int64_t begin, end;  // the positions that it sees
};

constexpr int64_t QUERIES = 16;  // at most

static inline int64_t least(const Query* queries, int64_t count) {
  int64_t begin = queries[0].begin;
  for (int64_t i = 1; i < count; i++) begin = std::min(begin, queries[i].begin);
  return begin / 16 * 16;
}

static inline int64_t most(const Query* queries, int64_t count) {
  int64_t end = 0;
  for (int64_t i = 0; i < count; i++) end = std::max(end, queries[i].end);
  return end;
}

#ifdef WIDE
INLINED __mmask16 lanes_of(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }
INLINED __m512 load16(const float* x, __mmask16 some) { return _mm512_maskz_loadu_ps(some, x); }
INLINED __m512 load16(const uint16_t* x, __mmask16 some) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, x)), 16));
}

// 16 positions of a cache as float32 `[16, wide]`; those from `count` on are zeros, for they may never have been written.
template <class T>
INLINED void widen16(const T* x, int64_t count, int64_t width, int64_t wide, float* to) {
  for (int64_t i = 0; i < 16; i++)
    for (int64_t c = 0; c < wide; c += 16)
      _mm512_storeu_ps(to + i * wide + c, i < count ? load16(x + i * width + c, lanes_of(width - c)) : _mm512_setzero_ps());
}

// `keys`, `values` `[positions, width]`; `room` for 16 of them in float32, the width rounded up to 16.
template <class T>
static void attend(const Query* queries, int64_t count, const T* keys, const T* values, int64_t width, float* room) {
  const int64_t wide = (width + 15) / 16 * 16, begin = least(queries, count), end = most(queries, count);
  const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(float(width))), none = _mm512_set1_ps(-INFINITY);
  __m512 peaks[QUERIES];
  for (int64_t i = 0; i < count; i++) peaks[i] = none;
  for (int64_t t = begin; t < end; t += 16) {
    widen16(keys + t * width, end - t, width, wide, room);
    for (int64_t i = 0; i < count; i++) {
      const Query& one = queries[i];
      if (t >= one.end || t + 16 <= one.begin) continue;
      __m512 sums[16];
      UNROLLED for (int j = 0; j < 16; j++) sums[j] = _mm512_setzero_ps();
      for (int64_t c = 0; c < wide; c += 16) {
        const __m512 q = load16(one.q + c, lanes_of(width - c));
        UNROLLED for (int j = 0; j < 16; j++) sums[j] = _mm512_fmadd_ps(_mm512_loadu_ps(room + j * wide + c), q, sums[j]);
      }
      const __mmask16 seen = lanes_of(one.end - t) & ~lanes_of(one.begin - t);
      const __m512 scores = _mm512_mask_mul_ps(none, seen, sums_of_16(sums), scale);
      _mm512_storeu_ps(one.shares + t, scores);
      peaks[i] = _mm512_max_ps(peaks[i], scores);
    }
  }
  float inverse[QUERIES];
  for (int64_t i = 0; i < count; i++) {
    const Query& one = queries[i];
    const __m512 peak = _mm512_set1_ps(_mm512_reduce_max_ps(peaks[i]));
    __m512 totals = _mm512_setzero_ps();
    for (int64_t t = one.begin / 16 * 16; t < one.end; t += 16) {
      const __m512 scores = _mm512_loadu_ps(one.shares + t);
      const __mmask16 seen = lanes_of(one.end - t) & ~lanes_of(one.begin - t);
      const __m512 shares = _mm512_maskz_mov_ps(seen, exp16(_mm512_sub_ps(scores, peak)));
      totals = _mm512_add_ps(totals, shares);
      _mm512_storeu_ps(one.shares + t, shares);
    }
    inverse[i] = 1.0f / _mm512_reduce_add_ps(totals);
    for (int64_t c = 0; c < width; c++) one.out[c] = 0;
  }
  for (int64_t t = begin; t < end; t += 16) {
    widen16(values + t * width, end - t, width, wide, room);
    for (int64_t i = 0; i < count; i++) {
      const Query& one = queries[i];
      if (t >= one.end || t + 16 <= one.begin) continue;
      for (int64_t c = 0; c < wide; c += 64) {
        __m512 sums[4];
        UNROLLED for (int p = 0; p < 4; p++) sums[p] = load16(one.out + c + 16 * p, lanes_of(width - c - 16 * p));
        for (int j = 0; j < 16; j++) {
          const __m512 share = _mm512_set1_ps(one.shares[t + j]);
          UNROLLED for (int p = 0; p < 4; p++)
            sums[p] = _mm512_fmadd_ps(share, _mm512_loadu_ps(room + j * wide + c + 16 * p), sums[p]);
        }
        UNROLLED for (int p = 0; p < 4; p++)
          _mm512_mask_storeu_ps(one.out + c + 16 * p, lanes_of(width - c - 16 * p), sums[p]);
      }
    }
  }
  for (int64_t i = 0; i < count; i++)
    for (int64_t c = 0; c < width; c++) queries[i].out[c] *= inverse[i];
}
#else
template <class T>
static void attend(const Query* queries, int64_t count, const T* keys, const T* values, int64_t width, float*) {
  const float scale = 1.0f / std::sqrt(float(width));
  for (int64_t i = 0; i < count; i++) {
    const Query& one = queries[i];
    float most = -INFINITY, total = 0;
    for (int64_t t = one.begin; t < one.end; t++) {
      float sum = 0;
      for (int64_t c = 0; c < width; c++) sum += one.q[c] * number(keys[t * width + c]);
      one.shares[t] = sum * scale;
      most = std::max(most, one.shares[t]);
    }
    for (int64_t t = one.begin; t < one.end; t++) total += one.shares[t] = std::exp(one.shares[t] - most);
    for (int64_t c = 0; c < width; c++) one.out[c] = 0;
    for (int64_t t = one.begin; t < one.end; t++)
      for (int64_t c = 0; c < width; c++) one.out[c] += one.shares[t] / total * number(values[t * width + c]);
  }
}
#endif

// How a feed-forward layer bends its gate: silu, gelu, gelu_tanh or relu.
static inline float activated(float x, int32_t kind) {
  switch (kind) {
    case 0: return x / (1.0f + std::exp(-x));
    case 1: return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f));
    case 2: return 0.5f * x * (1.0f + std::tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    default: return x > 0 ? x : 0;
  }
}

static inline void activate(float* x, int64_t count, int32_t kind) {  // at most 16
#ifdef WIDE
  if (kind == 0) {
    const __mmask16 some = lanes_of(count);
    const __m512 v = load16(x, some), one = _mm512_set1_ps(1.0f);
    _mm512_mask_storeu_ps(x, some, _mm512_div_ps(v, _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), v)))));
    return;
  }
#endif
  for (int64_t i = 0; i < count; i++) x[i] = activated(x[i], kind);
}
