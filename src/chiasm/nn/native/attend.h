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

// The same in a cache of bfloat16: queries and shares are rounded to it, and multiplied in pairs without being widened.
// `asked`: room for the queries, the width rounded up to 32.
INLINED __m512i row_of(const uint16_t* x, int64_t position, int64_t end, int64_t width, int64_t c) {
  return position < end && c < width ? some_of(x + position * width + c, width - c) : _mm512_setzero_si512();
}

// The products of a query and 16 positions, read as they lie in memory. W: the width in groups of 32, where it is known
// and all positions are there; 0: any.
template <int W>
INLINED __m512 scores16(const uint16_t* keys, const uint16_t* q, int64_t t, int64_t end, int64_t width) {
  __m512 sums[16];
  UNROLLED for (int j = 0; j < 16; j++) {
    sums[j] = _mm512_setzero_ps();
    if constexpr (W > 0) {
      UNROLLED for (int c = 0; c < W; c++)
        sums[j] = product(sums[j], all_of(keys + (t + j) * 32 * W + 32 * c), all_of(q + 32 * c));
    } else {
      for (int64_t c = 0; c < width; c += 32)
        sums[j] = product(sums[j], row_of(keys, t + j, end, width, c), all_of(q + c));
    }
  }
  return sums_of_16(sums);
}

// Up to N queries' sums of 64 columns of the values, from position `begin` to `end`.
template <int N>
static void mix64(const Query* queries, const float* inverse, const uint16_t* values, int64_t begin, int64_t end,
                  int64_t width, int64_t c) {
  __m512 sums[N][4];
  UNROLLED for (int i = 0; i < N; i++)
    UNROLLED for (int p = 0; p < 4; p++) sums[i][p] = _mm512_setzero_ps();
  for (int64_t t = begin; t < end; t += 2) {
    __m512i both[4];
    UNROLLED for (int p = 0; p < 2; p++) {
      const __m512i even = row_of(values, t, end, width, c + 32 * p), odd = row_of(values, t + 1, end, width, c + 32 * p);
      both[2 * p] = _mm512_unpacklo_epi16(even, odd);
      both[2 * p + 1] = _mm512_unpackhi_epi16(even, odd);
    }
    UNROLLED for (int i = 0; i < N; i++) {
      const __m512i share = _mm512_set1_epi32(((const int32_t*)queries[i].shares)[t / 2]);
      UNROLLED for (int p = 0; p < 4; p++) sums[i][p] = product(sums[i][p], both[p], share);
    }
  }
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  UNROLLED for (int i = 0; i < N; i++)
    UNROLLED for (int p = 0; p < 4; p++) {  // an unpacked vector has four columns of eight
      const __m512 sum = _mm512_permutex2var_ps(sums[i][p / 2 * 2], p % 2 ? second : first, sums[i][p / 2 * 2 + 1]);
      _mm512_mask_storeu_ps(queries[i].out + c + 16 * p, lanes_of(width - c - 16 * p),
                            _mm512_mul_ps(sum, _mm512_set1_ps(inverse[i])));
    }
}

static void attend(const Query* queries, int64_t count, const uint16_t* keys, const uint16_t* values, int64_t width,
                   uint16_t* asked) {
  const int64_t wide = (width + 31) / 32 * 32, begin = least(queries, count), end = most(queries, count);
  const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(float(width))), none = _mm512_set1_ps(-INFINITY);
  __m512 peaks[QUERIES];
  for (int64_t i = 0; i < count; i++) {
    peaks[i] = none;
    for (int64_t c = 0; c < wide; c += 16)
      _mm256_storeu_si256((__m256i*)(asked + i * wide + c), halved(load16(queries[i].q + c, lanes_of(width - c))));
  }
  for (int64_t t = begin; t < end; t += 16) {
    const bool whole = t + 16 <= end && wide == width;
    for (int64_t i = 0; i < count; i++) {
      const Query& one = queries[i];
      const uint16_t* q = asked + i * wide;
      const __mmask16 seen = lanes_of(one.end - t) & ~lanes_of(one.begin - t);
      const __m512 sums = whole && width == 64    ? scores16<2>(keys, q, t, end, width)
                          : whole && width == 128 ? scores16<4>(keys, q, t, end, width)
                                                  : scores16<0>(keys, q, t, end, width);
      const __m512 scores = _mm512_mask_mul_ps(none, seen, sums, scale);
      _mm512_storeu_ps(one.shares + t, scores);
      peaks[i] = _mm512_max_ps(peaks[i], scores);
    }
  }
  float inverse[QUERIES];
  for (int64_t i = 0; i < count; i++) {
    const Query& one = queries[i];
    const __m512 peak = _mm512_set1_ps(_mm512_reduce_max_ps(peaks[i]));
    __m512 totals = _mm512_setzero_ps();
    for (int64_t t = begin; t < end; t += 16) {  // shares take half the room of scores, in the same place
      const __mmask16 seen = lanes_of(one.end - t) & ~lanes_of(one.begin - t);
      const __m512 e = _mm512_maskz_mov_ps(seen, exp16(_mm512_sub_ps(_mm512_loadu_ps(one.shares + t), peak)));
      totals = _mm512_add_ps(totals, e);
      _mm256_storeu_si256((__m256i*)((uint16_t*)one.shares + t), halved(e));
    }
    inverse[i] = 1.0f / _mm512_reduce_add_ps(totals);
  }
  for (int64_t c = 0; c < width; c += 64)
    for (int64_t i = 0; i < count; i += 4) switch (count - i) {
        case 1: mix64<1>(queries + i, inverse + i, values, begin, end, width, c); break;
        case 2: mix64<2>(queries + i, inverse + i, values, begin, end, width, c); break;
        case 3: mix64<3>(queries + i, inverse + i, values, begin, end, width, c); break;
        default: mix64<4>(queries + i, inverse + i, values, begin, end, width, c);
      }
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
