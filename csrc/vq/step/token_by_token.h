// One token after the other, for generation and short inputs. For step.cpp.
//
// The first pass reads each codeword once. It gives the scores of all codes, which include those of quantised keys in
// the window, and the token's own code. The second pass adds up values: the sums of codes that have far keys, then the
// values in the window.
#pragma once

#include <vector>

#include "../../common/aligned_array.h"
#include "../../common/numbers.h"
#include "../laplace.h"
#include "call.h"

namespace longvq {

// Buffers of a thread.
struct TokenScratch {
  int64_t vector, far_vector;                // padded D and F
  int64_t far, near, columns;                // padded numbers of codes, of near keys, and their sum
  AlignedArray<float> vectors, far_vectors;  // key and queries: (1 + G, D); (1 + G, F), with far_q
  AlignedArray<float> scores, squares;       // (1 + G, columns), (far)
  AlignedArray<float> own, exact_scores;     // (G), (G, near) exact scores of the token's own key, of the ring
  AlignedArray<float> counts, value, out, weights;
  std::vector<const float*> rows;

  explicit TokenScratch(const StepCall& call)
      : vector(round_up(call.head_dim, call.step_kernel.lanes)),
        far_vector(round_up(call.far_head_dim, call.step_kernel.lanes)),
        far(round_up(call.num_codes, call.step_kernel.lanes)),
        near(round_up(call.max_ring + 1, call.step_kernel.lanes)), columns(far + near),
        vectors(aligned_array<float>((1 + call.group) * vector)),
        far_vectors(aligned_array<float>(call.has_far_q ? (1 + call.group) * far_vector : 0)),
        scores(aligned_array<float>((1 + call.group) * columns)), squares(aligned_array<float>(far)),
        own(aligned_array<float>(call.group)),
        exact_scores(aligned_array<float>(call.uses_exact_keys ? call.group * near : 0)),
        counts(aligned_array<float>(far)), value(aligned_array<float>(call.value_dim)),
        out(aligned_array<float>(call.value_dim)), weights(aligned_array<float>(columns)), rows(columns) {
    std::fill_n(vectors.get(), (1 + call.group) * vector, 0.0f);
    std::fill_n(far_vectors.get(), call.has_far_q ? (1 + call.group) * far_vector : 0, 0.0f);
    std::fill_n(counts.get(), far, 0.0f);
  }
};

struct TokenByToken {
  const StepCall& call;
  StepHead& head;
  TokenScratch& s;

  TokenByToken(StepHead& head, TokenScratch& scratch) : call(head.call), head(head), s(scratch) {
    for (int64_t c = 0; c < call.num_codes; ++c) {
      s.counts[c] = static_cast<float>(head.counts[c]);
    }
  }

  void run() {
    int64_t position = call.lengths[head.row];
    for (int64_t t = 0; t < call.length; ++t) {
      if (call.ignored(head.row, t)) {
        for (int64_t g = 0; g < call.group; ++g) {
          call.out.store_zeros(call.output_row(head.row, head.kv_head * call.group + g, t));
        }
      } else {
        token(t, position++);
      }
    }
  }

  void token(int64_t t, int64_t position) {
    call.v.load(head.row, head.kv_head, t, 1.0f, s.value.get());
    load(call.k, call.q, t, position, s.vector, s.vectors.get());
    if (call.has_far_q) {
      load(call.far_k, call.far_q, t, position, s.far_vector, s.far_vectors.get());
    }
    const int64_t code = score_codes(t, call.has_far_q ? s.far_vectors.get() : s.vectors.get());
    const auto far = [this](int64_t code, const float* value) {
      head.add_far(code, value);
      s.counts[code] = static_cast<float>(head.counts[code]);
    };
    if (call.window == 0) {
      far(code, s.value.get());
    } else if (call.uses_exact_keys) {
      score_exact(position);
    }
    for (int64_t g = 0; g < call.group; ++g) {
      attend(g, t, position, code);
    }
    if (call.window > 0) {
      head.push(position, code, s.vectors.get(), s.value.get(), far);
    }
  }

  // Loads the token's key, then its queries times the factor of their scores.
  void load(const StepInput& k, const StepInput& q, int64_t t, int64_t position, int64_t vector, float* out) const {
    k.load(head.row, head.kv_head, t, 1.0f, out);
    for (int64_t g = 0; g < call.group; ++g) {
      q.load(head.row, head.kv_head * call.group + g, t, call.score_factor(position), out + (1 + g) * vector);
    }
  }

  // Computes the scores of the codes for each query. Returns the token's code.
  int64_t score_codes(int64_t t, const float* vectors) {
    const bool given = call.codes != nullptr;
    const int64_t skip = given ? 1 : 0;  // the key is only needed to find the code
    call.step_kernel.products(
        head.codebook, call.code_stride, call.num_codes, call.far_head_dim, vectors + skip * s.far_vector,
        1 + call.group - skip, s.scores.get() + skip * s.columns, s.columns, given ? nullptr : s.squares.get());
    if (given) {
      return head.given_code(t);
    }
    int64_t best = 0;  // argmin |k - C|^2 = argmax k.C - |C|^2 / 2; of equals the lowest code
    float max_score = -kInfinity;
    for (int64_t c = 0; c < call.num_codes; ++c) {
      const float score = s.scores[c] - 0.5f * s.squares[c];
      if (score > max_score) {
        max_score = score;
        best = c;
      }
    }
    return best;
  }

  // Computes the scores of the token's own key, and of the keys in the ring by slot.
  void score_exact(int64_t position) {
    const float* queries = s.vectors.get() + s.vector;
    for (int64_t g = 0; g < call.group; ++g) {
      float own = 0.0f;
      for (int64_t d = 0; d < call.head_dim; ++d) {
        own += s.vectors[d] * queries[g * s.vector + d];
      }
      s.own[g] = own;
    }
    call.step_kernel.products(
        head.ring_keys, call.head_dim, head.in_ring(position), call.head_dim, queries, call.group, s.exact_scores.get(),
        s.near, nullptr);
  }

  void attend(int64_t g, int64_t t, int64_t position, int64_t code) {
    const int64_t query_head = head.kv_head * call.group + g;
    float* scores = s.scores.get() + (1 + g) * s.columns;
    // Scores of near keys by query - key; offset 0 is the token itself.
    float* near = scores + s.far;
    const int64_t near_keys = call.window == 0 ? 0 : 1 + head.in_ring(position);
    std::fill_n(near, s.near, -kInfinity);
    for (int64_t offset = 0; offset < near_keys; ++offset) {
      const int64_t slot = offset == 0 ? 0 : head.slot(position, offset);
      if (call.uses_exact_keys) {
        near[offset] = offset == 0 ? s.own[g] : s.exact_scores[g * s.near + slot];
      } else {
        near[offset] = scores[offset == 0 ? code : head.ring_codes[slot]];
      }
      if (call.bias != nullptr) {
        near[offset] += call.bias[query_head * call.window + offset];
      }
    }

    float factor = 1.0f;
    if (call.activation == Activation::kSoftmax) {
      factor = 1.0f / call.step_kernel.softmax(scores, s.counts.get(), s.far, s.near);
    } else {
      for (int64_t c = 0; c < s.far + near_keys; ++c) {
        scores[c] = c >= s.far || s.counts[c] > 0.0f ? laplace(scores[c]) : 0.0f;
      }
    }

    int64_t used = 0;
    const auto add = [&](float weight, const float* values) {
      s.weights[used] = weight;
      s.rows[used++] = values;
    };
    for (int64_t c = 0; c < call.num_codes; ++c) {
      if (s.counts[c] > 0.0f) {
        add(scores[c], head.sums + c * call.value_dim);
      }
    }
    for (int64_t offset = 0; offset < near_keys; ++offset) {
      add(near[offset], offset == 0 ? s.value.get() : head.ring_values + head.slot(position, offset) * call.value_dim);
    }
    call.step_kernel.weighted_sum(s.rows.data(), s.weights.get(), used, call.value_dim, s.out.get());
    call.out.store(call.output_row(head.row, query_head, t), s.out.get(), factor);
  }
};

}  // namespace longvq
