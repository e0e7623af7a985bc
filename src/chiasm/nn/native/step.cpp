// One decoding step of a Llama-family decoder: token ids in, logits out, in one call.
//
// It computes what `chiasm.lm.decoder` computes for positions whose earlier keys and values are cached; the sum of the
// residual stream, norms, softmax and scores are float32 whatever the weights are. Rows may belong to different slots,
// or be consecutive positions of one (a guessed continuation, or a prompt). All threads walk through the layers
// together. Each stage is cut into a few parts that threads take as they come, and is over when all parts are done: a
// thread that the system keeps from running holds up at most the part that it has.
#include <omp.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <functional>
#include <thread>

#include "decoder.h"

static inline void normed(const float* x, const float* weight, float eps, int64_t n, float* out) {
  float square = 0;
#pragma omp simd reduction(+ : square)
  for (int64_t i = 0; i < n; i++) square += x[i] * x[i];
  const float inverse = 1.0f / std::sqrt(square / n + eps);
  for (int64_t i = 0; i < n; i++) out[i] = weight[i] * (x[i] * inverse);
}

static inline void turned(float* x, const float* turn, int64_t rotary) {  // turn: cosines, then sines
  const int64_t half = rotary / 2;
  for (int64_t i = 0; i < half; i++) {
    const float a = x[i], b = x[half + i], c = turn[i], s = turn[half + i];
    x[i] = a * c - b * s;
    x[half + i] = b * c + a * s;
  }
}

// Outputs of a gate that are computed before those beside it: of a prompt as many as its rows pass together, of answers
// more, for memory is read fastest from end to end.
constexpr int64_t WIDEST = 2 * PANEL, LONG = 8 * PANEL;

enum Place { INTO_HEADS, INTO_OUT, INTO_MLP, INTO_DOWN };

struct Step {
  const Decoder& d;
  Work& work;
  int64_t m;
  const int32_t *slots, *positions;
  bool prompt;  // whether the rows are a prompt's: see prompt.h

  static int64_t part(int64_t n, int64_t i, int64_t of) { return n * i / of; }
  static int64_t panels(int64_t n, int64_t i, int64_t of, int64_t each = PANEL) {
    return std::min(part((n + each - 1) / each, i, of) * each, n);
  }
  int64_t panel_part(int64_t n, int64_t i, int64_t of) const {  // in whole panels, of prompts two by two
    return panels(n, i, of, prompt ? WIDEST : PANEL);
  }

  // Part `i` of `parts` for every part of stage number `stage`, by whichever threads come.
  template <class Do>
  void all(int64_t stage, int64_t parts, Do part) {
    Work::Stage& s = work.stages[stage];
    for (int64_t i = s.taken.fetch_add(1); i < parts; i = s.taken.fetch_add(1)) {
      part(i);
      s.done.fetch_add(1, std::memory_order_release);
    }
    for (int waited = 0; s.done.load(std::memory_order_acquire) < parts; waited++)
      if (waited > 4000) std::this_thread::yield();
  }

  // The same for a product: `part(rows, i, parts)` gets the rows [m, k] at `x`, normed where `weight` is given, in the
  // form that `w` is multiplied with. A few rows are prepared by every thread for itself, which costs less than a stage.
  template <class Do>
  void product(int64_t stage, Place place, const float* x, int64_t k, const float* weight, const Matrix& w, int thread,
               int64_t parts, Do part) {
    const bool alone = m <= 2;
    Rows& rows = alone ? work.own[thread].rows[place][w.kind] : work.shared[place][w.kind];
    const auto set = [&](int64_t row) {
      const float* from = x + row * k;
      float* scratch = work.own[thread].scratch.data();
      if (weight) normed(from, weight, d.eps, k, scratch), from = scratch;
      rows.set(row, from, w.kind);
    };
    bool ready = !alone;
    const int64_t each = m > 64 ? 8 : 1;
    const auto some = [&](int64_t i) {
      for (int64_t row = i * each; row < std::min(m, (i + 1) * each); row++) set(row);
    };
    if (!alone) all(stage, (m + each - 1) / each, some);
    all(stage + 1, parts, [&](int64_t i) {
      for (int64_t row = 0; !ready && row < m; row++) set(row);
      ready = true;
      part(rows, i, parts);
    });
  }

  template <class Give>
  void multiplied(const Matrix& w, const Rows& rows, int64_t first, int64_t last, int thread, Give give) {
#ifdef WIDE
    if (prompt && w.kind == BF16) return multiply_many(w, rows, first, last, 0, m, work.own[thread].laid, give);
#endif
    multiply(w, rows, first, last, 0, m, give);
  }

  void shape(Place place, int64_t k, const Matrix& w, int threads) {
    work.shared[place][w.kind].shape(m, k, w.kind);
    for (int i = 0; m <= 2 && i < threads; i++) work.own[i].rows[place][w.kind].shape(m, k, w.kind);
  }

  void heads_of(const Layer& layer, const Rows& rows, int thread, int64_t unit) {
    const int64_t width = d.width;
    float* into = work.own[thread].scratch.data();  // [m, width]
    const bool query = unit < d.heads, key = !query && unit < d.heads + d.kv_heads;
    const int64_t head = query ? unit : key ? unit - d.heads : unit - d.heads - d.kv_heads;
    const Matrix& w = query ? layer.q : key ? layer.k : layer.v;
    const int64_t first = head * width;
    multiplied(w, rows, first, first + width, thread, [&](int64_t row, int64_t n, int64_t count, const float* values) {
      std::memcpy(into + row * width + n - first, values, count * sizeof(float));
    });
    for (int64_t row = 0; row < m; row++) {
      float* x = into + row * width;
      const float* norm = query ? layer.q_norm : key ? layer.k_norm : nullptr;
      if (norm) normed(x, norm, d.eps, width, x);
      if (query || key) turned(x, work.turns.data() + row * d.rotary, d.rotary);
      if (query)
        std::memcpy(work.q.data() + (row * d.heads + head) * width, x, width * sizeof(float));
      else
        keep(key ? layer.keys : layer.values, row, head, x);
    }
  }

  int64_t place(int64_t row, int64_t head, int64_t position) const {
    return ((slots[row] * d.kv_heads + head) * d.capacity + position) * d.width;
  }

  void keep(void* cache, int64_t row, int64_t head, const float* x) const {
    const int64_t at = place(row, head, positions[row]);
    if (d.cache_kind == F32)
      std::memcpy((float*)cache + at, x, d.width * sizeof(float));
    else
      for (int64_t i = 0; i < d.width; i++) ((uint16_t*)cache)[at + i] = narrowed(x[i]);
  }

  // Heads of a group, at a few positions of one slot, read the same keys and values.
  void together() {
    const int64_t most = prompt ? 64 : std::max<int64_t>(1, QUERIES / (d.heads / d.kv_heads));
    work.firsts.assign(1, 0);
    for (int64_t row = 1; row <= m; row++)
      if (row == m || slots[row] != slots[row - 1] || row - work.firsts.back() == most) work.firsts.push_back(row);
  }

  void attention(const Layer& layer, int thread, int64_t item) {
    const int64_t rows = item / d.kv_heads, kv = item % d.kv_heads, group = d.heads / d.kv_heads;
    Work::Own& own = work.own[thread];
#ifdef WIDE
    if (prompt && d.cache_kind == BF16) return attention_of_prompt(layer, own, work.firsts[rows], work.firsts[rows + 1], kv);
#endif
    Query queries[QUERIES];
    int64_t count = 0;
    for (int64_t row = work.firsts[rows]; row < work.firsts[rows + 1]; row++)
      for (int64_t head = kv * group; head < (kv + 1) * group; head++) {
        const int64_t end = positions[row] + 1, at = (row * d.heads + head) * d.width;
        const int64_t begin = d.window && end > d.window ? end - d.window : 0;
        float* shares = own.shares.data() + count * (d.capacity + 16);
        queries[count++] = {work.q.data() + at, work.mixed.data() + at, shares, begin, end};
        if (count == QUERIES) attend_all(layer, queries, count, place(row, kv, 0), own), count = 0;
      }
    if (count) attend_all(layer, queries, count, place(work.firsts[rows], kv, 0), own);
  }

#ifdef WIDE
  void attention_of_prompt(const Layer& layer, Work::Own& own, int64_t first, int64_t last, int64_t kv) {
    const int64_t group = d.heads / d.kv_heads, at = place(first, kv, 0), end = positions[last - 1] + 1;
    const int64_t most = positions[first] + 1, begin = d.window && most > d.window ? most - d.window : 0;
    own.seen.take((uint16_t*)layer.keys + at, (uint16_t*)layer.values + at, d.width, begin, end);
    Query queries[ASKED];
    int64_t count = 0;
    for (int64_t row = first; row < last; row++)
      for (int64_t head = kv * group; head < (kv + 1) * group; head++) {
        const int64_t end = positions[row] + 1, at = (row * d.heads + head) * d.width;
        const int64_t begin = d.window && end > d.window ? end - d.window : 0;
        queries[count++] = {work.q.data() + at, work.mixed.data() + at, nullptr, begin, end};
        if (count == ASKED) own.seen.answer(queries, count), count = 0;
      }
    if (count) own.seen.answer(queries, count);
  }
#endif

  void attend_all(const Layer& layer, const Query* queries, int64_t count, int64_t at, Work::Own& own) {
    if (d.cache_kind == F32)
      attend(queries, count, (float*)layer.keys + at, (float*)layer.values + at, d.width, own.room.data());
    else
      attend(queries, count, (uint16_t*)layer.keys + at, (uint16_t*)layer.values + at, d.width, own.asked());
  }

  void add(const Matrix& w, const Rows& rows, int thread, int64_t i, int64_t parts) {
    multiplied(w, rows, panel_part(w.n, i, parts), panel_part(w.n, i + 1, parts), thread,
               [&](int64_t row, int64_t n, int64_t count, const float* values) {
                 float* x = work.x.data() + row * d.dim + n;
                 for (int64_t c = 0; c < count; c++) x[c] += values[c];
               });
  }

  void gated(const Layer& layer, const Rows& rows, int thread, int64_t i, int64_t parts) {
    const int64_t each = prompt ? WIDEST : LONG;
    float* gates = work.own[thread].scratch.data();  // [m, each]
    for (int64_t n = panel_part(d.mlp, i, parts), end = panel_part(d.mlp, i + 1, parts); n < end; n += each) {
      const int64_t last = std::min(n + each, end);
      multiplied(layer.gate, rows, n, last, thread, [&](int64_t row, int64_t at, int64_t count, float* values) {
        for (int64_t c = 0; c < count; c += 16) activate(values + c, std::min<int64_t>(16, count - c), d.activation);
        std::memcpy(gates + row * each + at - n, values, count * sizeof(float));
      });
      multiplied(layer.up, rows, n, last, thread, [&](int64_t row, int64_t at, int64_t count, const float* values) {
        float* inner = work.inner.data() + row * d.mlp + at;
        for (int64_t c = 0; c < count; c++) inner[c] = gates[row * each + at - n + c] * values[c];
      });
    }
  }

  // Three stages: the rows that are wanted, all logits, and of a shortlist those that may be among the `best`.
  void logits_of(int64_t stage, const int32_t* wanted, int64_t count, int64_t best, float* logits, int t, int64_t parts) {
    const bool some = best && d.list.w.weights;
    const int64_t n = d.head.n;
    Rows &ends = work.shared[INTO_HEADS][d.head.kind], &small = work.listed;
    all(stage, count, [&](int64_t i) {
      float* x = work.own[t].scratch.data();
      normed(work.x.data() + wanted[i] * d.dim, d.norm, d.eps, d.dim, x);
      ends.set(i, x, d.head.kind);
      for (int64_t c = 0; some && d.head.kind == BF16 && c < d.dim; c++) x[c] = widened(ends.half[i * ends.stride + c]);
      if (some) work.bounds[i] = d.list.set(small, i, x);
    });
    if (!some)
      return all(stage + 1, parts, [&](int64_t i) {
        multiply(d.head, ends, panel_part(n, i, parts), panel_part(n, i + 1, parts), 0, count,
                 [&](int64_t row, int64_t at, int64_t some, const float* values) {
                   std::memcpy(logits + row * n + at, values, some * sizeof(float));
                 });
      });
    Matrix rounded = d.list.w;
    rounded.bias = d.head.bias;
    all(stage + 1, parts, [&](int64_t i) {
      for (int64_t row = 0; row < count; row++) work.tops[row * parts + i] = -INFINITY;
      multiply(rounded, small, panel_part(n, i, parts), panel_part(n, i + 1, parts), 0, count,
               [&](int64_t row, int64_t at, int64_t some, const float* values) {
                 float& top = work.tops[row * parts + i];
                 for (int64_t c = 0; c < some; c++) {
                   const float added = std::fabs(values[c]) * 0x1p-22f;  // what adding biases and bounds may round off
                   const float bound = d.list.bound(at + c, work.bounds[row]) + added;
                   logits[row * n + at + c] = values[c] + bound;
                   top = std::max(top, values[c] - bound);
                 }
               });
    });
    all(stage + 2, parts, [&](int64_t i) {
      alignas(64) float out[PANEL];
      std::vector<float> tops(parts);
      for (int64_t row = 0; row < count; row++) {  // as many parts as are asked for hold a logit of `least` or more
        std::copy_n(work.tops.begin() + row * parts, parts, tops.begin());
        if (best <= parts) std::nth_element(tops.begin(), tops.begin() + best - 1, tops.end(), std::greater<float>());
        const float least = best <= parts ? tops[best - 1] : -INFINITY;
        for (int64_t at = panel_part(n, i, parts), end = panel_part(n, i + 1, parts); at < end; at++) {
          float& logit = logits[row * n + at];
          if (logit < least)
            logit = -INFINITY;
          else  // so too where it is no number
            block(d.head, ends, at, 1, row, row, row + 1, out), logit = out[0] + (d.head.bias ? d.head.bias[at] : 0);
        }
      }
    });
  }

  void run(const int32_t* wanted, int64_t count, int64_t best, float* logits, int threads) {
    for (int64_t l = 0; l < d.depth; l++) {
      shape(INTO_HEADS, d.dim, d.layers[l].q, threads);
      shape(INTO_OUT, d.heads * d.width, d.layers[l].o, threads);
      shape(INTO_MLP, d.dim, d.layers[l].gate, threads);
      shape(INTO_DOWN, d.mlp, d.layers[l].down, threads);
    }
    Rows& ends = work.shared[INTO_HEADS][d.head.kind];
    ends.shape(std::max(m, count), d.dim, d.head.kind);
    const int64_t few = prompt ? 16 * threads : 4 * threads, units = d.heads + 2 * d.kv_heads, width = d.heads * d.width;
    if (best) {
      work.listed.shape(count, d.dim, INT8);
      Rows::grow(work.tops, count * 4 * few);
      if (int64_t(work.bounds.size()) < count) work.bounds.resize(count);
    }
    work.begin(d.depth * 9 + 3);
    together();
    const int64_t items = (int64_t(work.firsts.size()) - 1) * d.kv_heads;
#pragma omp parallel num_threads(threads)
    {
      const int t = omp_get_thread_num();
      int64_t stage = 0;
      for (int64_t l = 0; l < d.depth; l++, stage += 9) {
        const Layer& layer = d.layers[l];
        const auto sum = [&](const Matrix& w) {
          return [&](const Rows& rows, int64_t i, int64_t parts) { add(w, rows, t, i, parts); };
        };
        product(stage, INTO_HEADS, work.x.data(), d.dim, layer.attn_norm, layer.q, t, units,
                [&](const Rows& rows, int64_t i, int64_t) { heads_of(layer, rows, t, i); });
        all(stage + 2, items, [&](int64_t item) { attention(layer, t, item); });
        product(stage + 3, INTO_OUT, work.mixed.data(), width, nullptr, layer.o, t, few, sum(layer.o));
        product(stage + 5, INTO_MLP, work.x.data(), d.dim, layer.mlp_norm, layer.gate, t, few,
                [&](const Rows& rows, int64_t i, int64_t parts) { gated(layer, rows, t, i, parts); });
        product(stage + 7, INTO_DOWN, work.inner.data(), d.mlp, nullptr, layer.down, t, few, sum(layer.down));
      }
      logits_of(stage, wanted, count, best, logits, t, 4 * few);
    }
  }
};

extern "C" {

void* chiasm_work() { return new Work(); }
void chiasm_free(void* work) { delete (Work*)work; }

// `ids [m]`, or their vectors `given [m, dim]`; `slots`, `positions` `[m]`; logits `[count, vocab]` of the rows
// `wanted [count]`. The rows are of a `prompt`, or of answers. Where `best` is not 0, logits that cannot be among so many
// best of their row may be minus infinity.
void chiasm_step(const Decoder* d, void* memory, int64_t m, const int64_t* ids, const float* given,
                 const int32_t* slots, const int32_t* positions, const int32_t* wanted, int64_t count, int64_t best,
                 float* logits, int32_t threads, int32_t prompt) {
  Work& work = *(Work*)memory;
  Rows::grow(work.x, m * d->dim);
  Rows::grow(work.q, m * d->heads * d->width);
  Rows::grow(work.mixed, m * d->heads * d->width);
  Rows::grow(work.inner, m * d->mlp);
  Rows::grow(work.turns, m * d->rotary);
  if (int64_t(work.own.size()) < threads) work.own.resize(threads);
  for (auto& own : work.own) {
    Rows::grow(own.scratch, std::max({d->dim, d->heads * d->width, d->mlp, m * d->width, m * (prompt ? WIDEST : LONG)}));
    Rows::grow(own.shares, QUERIES * (d->capacity + 16));
    Rows::grow(own.room, 16 * (d->width + 31) + 16);
  }
  for (int64_t row = 0; row < m; row++) {
    float* x = work.x.data() + row * d->dim;
    if (given)
      std::memcpy(x, given + row * d->dim, d->dim * sizeof(float));
    else if (d->embedding_kind == F32)
      std::memcpy(x, (const float*)d->embedding + ids[row] * d->dim, d->dim * sizeof(float));
    else
      for (int64_t i = 0; i < d->dim; i++) x[i] = widened(((const uint16_t*)d->embedding)[ids[row] * d->dim + i]);
    for (int64_t i = 0; i < d->rotary / 2; i++) {
      const float angle = float(positions[row]) * d->frequencies[i];
      work.turns[row * d->rotary + i] = std::cos(angle) * d->amplitude;
      work.turns[row * d->rotary + d->rotary / 2 + i] = std::sin(angle) * d->amplitude;
    }
  }
  Step{*d, work, m, slots, positions, bool(prompt)}.run(wanted, count, best, logits, threads);
}

// Fills what a shortlist of `w` points to: see shortlist.h.
void chiasm_shorten(const Matrix* w, uint8_t* packed, float* scales, float* off, float* length, int32_t threads) {
  shortened(*w, packed, scales, off, length, threads);
}

// `out [m, n] = x [m, k] · wᵀ + bias`, both of `kind` (F32 or BF16), for weights of any kind.
void chiasm_linear(const Matrix* w, void* memory, int64_t m, const void* x, void* out, int32_t kind, int32_t threads) {
  Rows& rows = ((Work*)memory)->shared[INTO_HEADS][w->kind];
  rows.shape(m, w->k, w->kind);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> wide(w->k);
#pragma omp for
    for (int64_t row = 0; row < m; row++) {
      if (kind == BF16)
        for (int64_t i = 0; i < w->k; i++) wide[i] = widened(((const uint16_t*)x)[row * w->k + i]);
      rows.set(row, kind == BF16 ? wide.data() : (const float*)x + row * w->k, w->kind);
    }
    const int thread = omp_get_thread_num(), all = omp_get_num_threads();
    for (int64_t m0 = 0; m0 < m; m0 += 128)  // so many activation rows stay in the second cache
      multiply(*w, rows, Step::panels(w->n, thread, all), Step::panels(w->n, thread + 1, all), m0,
               std::min(m0 + 128, m), [&](int64_t row, int64_t n, int64_t count, const float* values) {
                 if (kind == BF16)
                   for (int64_t i = 0; i < count; i++) ((uint16_t*)out)[row * w->n + n + i] = narrowed(values[i]);
                 else
                   std::memcpy((float*)out + row * w->n + n, values, count * sizeof(float));
               });
  }
}

// Puts what lies at `start` on large pages: looking up a page of 4 KB takes as long as reading a good part of it.
// `later`: only what is written from now on.
void chiasm_large_pages(const void* start, int64_t bytes, int32_t later) {
#if defined(__linux__)
  constexpr int COLLAPSE = 25;  // MADV_COLLAPSE, which older headers lack; a kernel without it refuses
  madvise((void*)start, bytes, later ? MADV_HUGEPAGE : COLLAPSE);
#endif
}
}
