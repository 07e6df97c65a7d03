// One token after the other, for generation and short pieces. For attention_step_cpu.cpp.
//
// A pass over the codebook, in which each codeword is read once, gives the scores of all codes and the token's own
// code; the scores of quantised keys in the window are among them. A second pass adds up values: the sums of codes that
// have far keys, then the window.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "../../common/aligned_array.h"
#include "call.h"

namespace longvq {

// Per thread.
struct TokenScratch {
  int64_t vector, far_vector;                // padded D and F
  int64_t far, near, columns;                // padded numbers of codes, near keys, both together
  AlignedArray<float> vectors, far_vectors;  // (1 + G, D) key and queries; (1 + G, F) where far_k and far_q are others
  AlignedArray<float> scores, squares;       // (1 + G, columns), (far)
  AlignedArray<float> own, exact;            // (G), (G, near) scores of the token's own exact key, of those before
  AlignedArray<float> counts, value, out, weights;
  std::vector<const float*> rows;

  explicit TokenScratch(const StepProblem& p)
      : vector(round_up(p.near_depth, p.step_kernel.lanes)), far_vector(round_up(p.far_depth, p.step_kernel.lanes)),
        far(round_up(p.num_codes, p.step_kernel.lanes)), near(round_up(p.most_near + 1, p.step_kernel.lanes)),
        columns(far + near), vectors(aligned_array<float>((1 + p.group) * vector)),
        far_vectors(aligned_array<float>(p.has_far_q ? (1 + p.group) * far_vector : 0)),
        scores(aligned_array<float>((1 + p.group) * columns)), squares(aligned_array<float>(far)),
        own(aligned_array<float>(p.group)), exact(aligned_array<float>(p.exact ? p.group * near : 0)),
        counts(aligned_array<float>(far)), value(aligned_array<float>(p.values)), out(aligned_array<float>(p.values)),
        weights(aligned_array<float>(columns)), rows(columns) {
    std::fill_n(vectors.get(), (1 + p.group) * vector, 0.0f);
    std::fill_n(far_vectors.get(), p.has_far_q ? (1 + p.group) * far_vector : 0, 0.0f);
    std::fill_n(counts.get(), far, 0.0f);
  }
};

struct TokenByToken {
  const StepProblem& p;
  StepHead& head;
  TokenScratch& s;

  TokenByToken(StepHead& head, TokenScratch& scratch) : p(head.p), head(head), s(scratch) {
    for (int64_t c = 0; c < p.num_codes; ++c) {
      s.counts[c] = static_cast<float>(head.counts[c]);
    }
  }

  void run() {
    int64_t position = p.lengths[head.row];
    for (int64_t t = 0; t < p.length; ++t) {
      if (p.ignored(head.row, t)) {
        for (int64_t g = 0; g < p.group; ++g) {
          p.out.store_zeros(p.place(head.row, head.kv_head * p.group + g, t));
        }
      } else {
        token(t, position++);
      }
    }
  }

  void token(int64_t t, int64_t position) {
    p.v.load(head.row, head.kv_head, t, 1.0f, s.value.get());
    load(p.k, p.q, t, position, s.vector, s.vectors.get());
    if (p.has_far_q) {
      load(p.far_k, p.far_q, t, position, s.far_vector, s.far_vectors.get());
    }
    const int64_t code = score_codes(t, p.has_far_q ? s.far_vectors.get() : s.vectors.get());
    const auto far = [this](int64_t code, const float* value) {
      head.add_far(code, value);
      s.counts[code] = static_cast<float>(head.counts[code]);
    };
    if (p.window == 0) {
      far(code, s.value.get());
    } else if (p.exact) {
      score_exact(position);
    }
    for (int64_t g = 0; g < p.group; ++g) {
      attend(g, t, position, code);
    }
    if (p.window > 0) {
      head.push(position, code, s.vectors.get(), s.value.get(), far);
    }
  }

  // The token's key, then its queries times the factor of their scores.
  void load(const StepInput& k, const StepInput& q, int64_t t, int64_t position, int64_t vector, float* out) const {
    k.load(head.row, head.kv_head, t, 1.0f, out);
    for (int64_t g = 0; g < p.group; ++g) {
      q.load(head.row, head.kv_head * p.group + g, t, p.unit(position), out + (1 + g) * vector);
    }
  }

  // Scores of the codes into those of each query; returns the token's code.
  int64_t score_codes(int64_t t, const float* vectors) {
    const bool given = p.codes != nullptr;
    const int64_t skip = given ? 1 : 0;  // the key
    p.step_kernel.products(
        head.codebook, p.code_stride, p.num_codes, p.far_depth, vectors + skip * s.far_vector, 1 + p.group - skip,
        s.scores.get() + skip * s.columns, s.columns, given ? nullptr : s.squares.get());
    if (given) {
      return head.given_code(t);
    }
    int64_t best = 0;  // argmin |k - C|^2 = argmax k.C - |C|^2 / 2; the lowest of equals
    float top = -std::numeric_limits<float>::infinity();
    for (int64_t c = 0; c < p.num_codes; ++c) {
      const float score = s.scores[c] - 0.5f * s.squares[c];
      if (score > top) {
        top = score;
        best = c;
      }
    }
    return best;
  }

  // Scores of the token's own key, and by slot of those in the ring.
  void score_exact(int64_t position) {
    const float* queries = s.vectors.get() + s.vector;
    for (int64_t g = 0; g < p.group; ++g) {
      float own = 0.0f;
      for (int64_t d = 0; d < p.near_depth; ++d) {
        own += s.vectors[d] * queries[g * s.vector + d];
      }
      s.own[g] = own;
    }
    p.step_kernel.products(
        head.ring_keys, p.near_depth, head.in_ring(position), p.near_depth, queries, p.group, s.exact.get(), s.near,
        nullptr);
  }

  void attend(int64_t g, int64_t t, int64_t position, int64_t code) {
    const int64_t query_head = head.kv_head * p.group + g;
    float* scores = s.scores.get() + (1 + g) * s.columns;
    // Near keys by their offset, the token itself first.
    float* near = scores + s.far;
    const int64_t near_keys = p.window == 0 ? 0 : 1 + head.in_ring(position);
    std::fill_n(near, s.near, -std::numeric_limits<float>::infinity());
    for (int64_t offset = 0; offset < near_keys; ++offset) {
      const int64_t slot = offset == 0 ? 0 : head.slot(position, offset);
      if (p.exact) {
        near[offset] = offset == 0 ? s.own[g] : s.exact[g * s.near + slot];
      } else {
        near[offset] = scores[offset == 0 ? code : head.ring_codes[slot]];
      }
      if (p.bias != nullptr) {
        near[offset] += p.bias[query_head * p.window + offset];
      }
    }

    float factor = 1.0f;
    if (p.activation == Activation::kSoftmax) {
      factor = 1.0f / p.step_kernel.softmax(scores, s.counts.get(), s.far, s.near);
    } else {
      for (int64_t c = 0; c < s.far + near_keys; ++c) {
        scores[c] = c >= s.far || s.counts[c] > 0.0f ? laplace(scores[c]) : 0.0f;
      }
    }

    int64_t used = 0;
    const auto use = [&](float weight, const float* values) {
      s.weights[used] = weight;
      s.rows[used++] = values;
    };
    for (int64_t c = 0; c < p.num_codes; ++c) {
      if (s.counts[c] > 0.0f) {
        use(scores[c], head.sums + c * p.values);
      }
    }
    for (int64_t offset = 0; offset < near_keys; ++offset) {
      use(near[offset], offset == 0 ? s.value.get() : head.ring_values + head.slot(position, offset) * p.values);
    }
    p.step_kernel.weighted_sum(s.rows.data(), s.weights.get(), used, p.values, s.out.get());
    p.out.store(p.place(head.row, query_head, t), s.out.get(), factor);
  }

  // Mega's attention function, as in attention_kernel.cpp.
  static float laplace(float score) {
    constexpr float kMu = 0.70710678f, kInverse = 2.50662827f;  // 1 / (sigma sqrt 2) = sqrt(2 pi)
    return 0.5f * std::erfc((kMu - score) * kInverse);
  }
};

}  // namespace longvq
