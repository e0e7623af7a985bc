// A decoder as a step reads it, and the memory that a step works in.
#pragma once
#include <atomic>
#include <memory>

#include "prompt.h"
#include "shortlist.h"

struct Layer {
  Matrix q, k, v, o, gate, up, down;
  const float *attn_norm, *mlp_norm, *q_norm, *k_norm;  // q_norm, k_norm: null without
  void *keys, *values;                                  // [slots, kv_heads, capacity, width] in `cache_kind`
};

struct Decoder {
  const Layer* layers;
  const void* embedding;      // [vocab, dim] in `embedding_kind`
  const float* norm;          // [dim]
  const float* frequencies;   // [rotary / 2]
  Matrix head;
  Shortlist list;             // of the head
  int64_t depth, dim, heads, kv_heads, width, rotary, mlp, capacity, window;  // window: 0 without
  float eps, amplitude;
  int32_t embedding_kind, cache_kind, activation, padding;  // activation: silu, gelu, gelu_tanh, relu
};

// What one call works in. Buffers are kept between calls.
struct Work {
  std::vector<float> x, q, mixed, inner, turns;  // [m, dim], twice [m, heads * width], [m, mlp], [m, rotary]
  Rows shared[4][4];                             // by the width they have (Place) and the kind they are multiplied with
  struct Own {
    Rows rows[4][4];
    std::vector<float> scratch, shares, room;
#ifdef WIDE
    uint16_t* asked() { return (uint16_t*)room.data(); }
#else
    float* asked() { return room.data(); }
#endif
    std::vector<uint32_t> laid;  // weights of a prompt's product
#ifdef WIDE
    Seen seen;
#endif
  };
  std::vector<Own> own;  // of each thread
  Rows listed;                         // those whose logits are wanted, as a shortlist is multiplied with
  std::vector<Shortlist::Row> bounds;  // what they add to its bounds
  std::vector<float> tops;             // [rows, parts]: the highest lower bound of the logits of a part
  std::vector<int64_t> firsts;  // rows at which another slot begins, or enough queries are together; and the last's end

  struct alignas(64) Stage {
    std::atomic<int64_t> taken{0}, done{0};
  };
  std::unique_ptr<Stage[]> stages;
  int64_t stage_count = 0;

  void begin(int64_t count) {
    if (stage_count < count) stages.reset(new Stage[count]), stage_count = count;
    for (int64_t i = 0; i < count; i++) stages[i].taken = 0, stages[i].done = 0;
  }
};
