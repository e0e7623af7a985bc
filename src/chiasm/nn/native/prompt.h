// What only the tokens of prompts pass: many activation rows at once, so that arithmetic and not memory is the limit.
//
// Products: 32 rows of bfloat16 weights at a time are laid out as pairs of inputs `[k / 2, 32]` in a few microseconds,
// and up to 14 activation rows pass them with all sums in registers. Attention: keys and values of one head are laid out the
// same way, and 8 queries pass them; scores, softmax and sums are float32, queries and shares bfloat16.
//
// Every output is summed in one fixed order here too: a token of a prompt is computed as it is in any other chunk,
// whatever stands beside it. It is another order than that of single tokens in `matrix.h` and `attend.h`.
#pragma once
#include "attend.h"

#ifdef WIDE
constexpr int64_t BLOCK = 2 * PANEL, TALL = 14;  // outputs, activation rows
constexpr int ASKED = 8;                         // queries

INLINED void across(__m512i* r) {  // the transpose of 16 vectors of 16 pairs
  __m512i a[16];
  UNROLLED for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  UNROLLED for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  UNROLLED for (int i = 0; i < 4; i++) {
    const __m512i low = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), high = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    const __m512i more = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    const __m512i most = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    a[i] = _mm512_shuffle_i32x4(low, more, 0x88);
    a[i + 8] = _mm512_shuffle_i32x4(low, more, 0xdd);
    a[i + 4] = _mm512_shuffle_i32x4(high, most, 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(high, most, 0xdd);
  }
  UNROLLED for (int i = 0; i < 16; i++) r[i] = a[i];
}

// `count` rows of `k` numbers, `step` from one to the next → pairs of neighbours `to [k / 2, wide]`; at most 16 rows, the
// others are zeros. `k` is filled up to a multiple of 32 with zeros.
INLINED void pairs_of(const uint16_t* rows, int64_t step, int64_t count, int64_t k, uint32_t* to, int64_t wide) {
  for (int64_t c = 0; c < k; c += 32) {
    __m512i r[16];
    UNROLLED for (int i = 0; i < 16; i++) r[i] = i < count ? some_of(rows + i * step + c, k - c) : _mm512_setzero_si512();
    across(r);
    UNROLLED for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + (c / 2 + i) * wide, r[i]);
  }
}

// M activation rows past 32 laid out weight rows → `out [M, 32]`. Some lines from `next` on are fetched meanwhile.
template <int M>
static __attribute__((noinline)) void pass(const uint32_t* ws, const uint16_t* from, int64_t stride, int64_t pairs,
                                           const char* next, int64_t lines, float* out) {
  __m512 sums[M][2];
  UNROLLED for (int r = 0; r < M; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
  const uint32_t* x = (const uint32_t*)from;
  const int64_t step = stride / 2;
  for (int64_t p = 0; p < pairs; p++) {
    if (p < lines) _mm_prefetch(next + p * 64, _MM_HINT_T1);
    if (p + pairs < lines) _mm_prefetch(next + (p + pairs) * 64, _MM_HINT_T1);
    const __m512i a = _mm512_loadu_si512(ws + p * BLOCK), b = _mm512_loadu_si512(ws + p * BLOCK + PANEL);
    UNROLLED for (int r = 0; r < M; r++) {
      const __m512i both = _mm512_set1_epi32(x[r * step + p]);
      sums[r][0] = product(sums[r][0], a, both);
      sums[r][1] = product(sums[r][1], b, both);
    }
  }
  UNROLLED for (int r = 0; r < M; r++) {
    _mm512_storeu_ps(out + r * BLOCK, sums[r][0]);
    _mm512_storeu_ps(out + r * BLOCK + PANEL, sums[r][1]);
  }
}

// `rows` of them, by the code for so many.
template <int M = TALL>
static inline void some_rows(int64_t rows, const uint32_t* ws, const uint16_t* x, int64_t stride, int64_t pairs,
                             const char* next, int64_t lines, float* out) {
  if constexpr (M > 0)
    rows == M ? pass<M>(ws, x, stride, pairs, next, lines, out) : some_rows<M - 1>(rows, ws, x, stride, pairs, next, lines, out);
}

// As `multiply`, at most 32 outputs at a time. `room`: where weights are laid out.
template <class Give>
static void multiply_many(const Matrix& w, const Rows& x, int64_t n0, int64_t n1, int64_t m0, int64_t m1,
                          std::vector<uint32_t>& room, Give give) {
  alignas(64) float out[TALL * BLOCK];
  Rows::grow(room, x.stride / 2 * BLOCK);
  const int64_t step = w.stride / 2, pairs = (w.k + 1) / 2;
  for (int64_t n = n0; n < n1; n += BLOCK) {
    const int64_t count = std::min(BLOCK, n1 - n), lines = BLOCK * w.stride / 64, turns = (m1 - m0 + TALL - 1) / TALL;
    const uint16_t* from = (const uint16_t*)w.weights + n * step;
    for (int64_t i = 0; i < BLOCK; i += PANEL)
      pairs_of(from + i * step, step, std::min(PANEL, count - i), w.k, room.data() + i, BLOCK);
    for (int64_t turn = 0; turn < turns; turn++) {  // of about as many rows each: 15 are 8 and 7, not 14 and 1
      const int64_t m = m0 + (m1 - m0) * turn / turns, done = m0 + (m1 - m0) * (turn + 1) / turns - m;
      const int64_t first = turn * lines / turns, last = (turn + 1) * lines / turns;
      const char* next = (const char*)(from + BLOCK * step) + first * 64;
      some_rows(done, room.data(), x.half.data() + m * x.stride, x.stride, pairs, next, last - first, out);
      for (int64_t j = 0; j < done; j++) {
        float* values = out + j * BLOCK;
        if (w.bias)
          for (int64_t i = 0; i < count; i++) values[i] += w.bias[n + i];
        give(m + j, n, count, values);
      }
    }
  }
}

// One head of keys and values in bfloat16, laid out for the queries of a prompt.
struct Seen {
  int64_t width = 0, places = 0, columns = 0;  // positions and width in groups of 32
  std::vector<uint32_t> keys, values, shares, asked;
  std::vector<float> scores;

  // `keys`, `values` `[positions, width]`; positions before `begin` are left out.
  void take(const uint16_t* k, const uint16_t* v, int64_t w, int64_t begin, int64_t end) {
    width = w, places = (end + 31) / 32 * 32, columns = (w + 31) / 32 * 32;
    Rows::grow(keys, columns / 2 * places);
    Rows::grow(values, places / 2 * columns);
    Rows::grow(shares, ASKED * places / 2);
    Rows::grow(scores, ASKED * places);
    Rows::grow(asked, ASKED * columns / 2);
    for (int64_t t = begin / 32 * 32; t < places; t += 16)
      pairs_of(k + t * width, width, end - t, width, keys.data() + t, places);
    for (int64_t t = begin / 32 * 32; t < places; t += 2)
      for (int64_t c = 0; c < columns; c += 16) {
        const __mmask16 some = lanes_of(width - c), even = t < end ? some : 0, odd = t + 1 < end ? some : 0;
        const __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(even, v + t * width + c));
        const __m512i b = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd, v + (t + 1) * width + c));
        _mm512_storeu_si512(values.data() + t / 2 * columns + c, _mm512_or_si512(a, _mm512_slli_epi32(b, 16)));
      }
  }

  // `ASKED` queries at once; of fewer, the last stands for the others.
  void answer(const Query* queries, int64_t count) {
    const int64_t first = least(queries, count) / 32 * 32, last = most(queries, count);
    const Query* one[ASKED];
    for (int64_t r = 0; r < ASKED; r++) {
      one[r] = queries + std::min(r, count - 1);
      uint16_t* to = (uint16_t*)(asked.data() + r * columns / 2);
      for (int64_t c = 0; c < columns; c++) to[c] = c < width ? narrowed(one[r]->q[c]) : 0;
    }
    for (int64_t t = first; t < last; t += 32) score(t);
    float inverse[ASKED];
    for (int64_t r = 0; r < ASKED; r++) inverse[r] = soften(r, *one[r], first, last);
    for (int64_t c = 0; c < width; c += 32) mix(c, first, last, inverse, one, count);
  }

  void score(int64_t t) {
    __m512 sums[ASKED][2];
    UNROLLED for (int r = 0; r < ASKED; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (int64_t c = 0; c < columns / 2; c++) {
      const __m512i a = _mm512_loadu_si512(keys.data() + c * places + t);
      const __m512i b = _mm512_loadu_si512(keys.data() + c * places + t + 16);
      UNROLLED for (int r = 0; r < ASKED; r++) {
        const __m512i x = _mm512_set1_epi32(asked[r * columns / 2 + c]);
        sums[r][0] = product(sums[r][0], a, x);
        sums[r][1] = product(sums[r][1], b, x);
      }
    }
    UNROLLED for (int r = 0; r < ASKED; r++) {
      _mm512_storeu_ps(scores.data() + r * places + t, sums[r][0]);
      _mm512_storeu_ps(scores.data() + r * places + t + 16, sums[r][1]);
    }
  }

  // exp(score - highest) of one query as bfloat16 → the inverse of their sum.
  float soften(int64_t r, const Query& one, int64_t first, int64_t last) {
    float* row = scores.data() + r * places;
    uint16_t* to = (uint16_t*)(shares.data() + r * places / 2);
    const __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(float(width))), none = _mm512_set1_ps(-INFINITY);
    __m512 peaks = none, totals = _mm512_setzero_ps();
    for (int64_t t = first; t < last; t += 16) {
      const __mmask16 seen = lanes_of(one.end - t) & ~lanes_of(one.begin - t);
      const __m512 scaled = _mm512_mask_mul_ps(none, seen, _mm512_loadu_ps(row + t), scale);
      _mm512_storeu_ps(row + t, scaled);
      peaks = _mm512_max_ps(peaks, scaled);
    }
    const __m512 peak = _mm512_set1_ps(_mm512_reduce_max_ps(peaks));
    for (int64_t t = first; t < (last + 31) / 32 * 32; t += 16) {
      const __mmask16 seen = lanes_of(one.end - t) & ~lanes_of(one.begin - t);
      const __m512 e = _mm512_maskz_mov_ps(seen, exp16(_mm512_sub_ps(_mm512_loadu_ps(row + t), peak)));
      totals = _mm512_add_ps(totals, e);
      _mm256_storeu_si256((__m256i*)(to + t), halved(e));
    }
    return 1.0f / _mm512_reduce_add_ps(totals);
  }

  void mix(int64_t c, int64_t first, int64_t last, const float* inverse, const Query* const* one, int64_t count) {
    __m512 sums[ASKED][2];
    UNROLLED for (int r = 0; r < ASKED; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    for (int64_t p = first / 2; p < (last + 1) / 2; p++) {
      const __m512i a = _mm512_loadu_si512(values.data() + p * columns + c);
      const __m512i b = _mm512_loadu_si512(values.data() + p * columns + c + 16);
      UNROLLED for (int r = 0; r < ASKED; r++) {
        const __m512i x = _mm512_set1_epi32(shares[r * places / 2 + p]);
        sums[r][0] = product(sums[r][0], a, x);
        sums[r][1] = product(sums[r][1], b, x);
      }
    }
    for (int64_t r = 0; r < count; r++)
      for (int half = 0; half < 2; half++)
        _mm512_mask_storeu_ps(one[r]->out + c + 16 * half, lanes_of(width - c - 16 * half),
                              _mm512_mul_ps(sums[r][half], _mm512_set1_ps(inverse[r])));
  }
};
#endif
