// Softmax attention over a span of keys for each query, forward and backward, on a CPU.
//
// The query at row t of a sequence sees the keys at rows first[t] to last[t], and neither ever falls: causal attention,
// windows, packed documents and caches, whose hidden keys cost nothing but the corners of blocks. Scores exist a block
// at a time, as (keys, queries): what belongs to a query (maximum, sum, log-sum-exp) is then a vector over columns, and
// nothing is ever summed across a vector. Sums are fp32, in an order that depends on shapes alone: the number of
// threads changes no bit.
//
// B sequences, T queries, S keys, H query heads, K kv heads, C head dim.

#include <omp.h>

#include <atomic>
#include <thread>
#include <vector>

#include "products.h"

namespace {

constexpr int64_t KEYS = 64, QUERIES = COLUMNS;  // rows and columns of a block of scores; rows too many are hidden
constexpr float HIDDEN = -1e30f, LEAST = -1e20f;  // below LEAST, a score's weight is 0
constexpr float LOG2_E = 1.4426950408889634f;

INLINE Ints load(const int32_t* p) {
    Ints v;
    memcpy(&v, p, sizeof v);
    return v;
}

// 2^x to 2e-7; 0 where that is no normal number. For x up to 127.
INLINE Floats exp2(Floats x) {
    constexpr float SHIFT = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, kept in the low bits
    Floats shifted = x + SHIFT, f = x - (shifted - SHIFT);
    Floats p = f * 1.5403530393381609e-4f + 1.3333558146428443e-3f;  // the series of 2^f: ln(2)^k / k!
    p = p * f + 9.6181291076284772e-3f;
    p = p * f + 5.5504108664821580e-2f;
    p = p * f + 2.4022650695910071e-1f;
    p = p * f + 6.9314718055994531e-1f;
    p = p * f + 1.0f;
    Floats y = (Floats)((Ints)p + ((Ints)shifted << 23));
    return x < -126.0f ? Floats{} : y;
}

struct Shape {
    int64_t batch, tokens, keys, heads, kv_heads, size;
    const int32_t *first, *last;  // (B, T)
    int32_t threads;
};

struct Heads {  // (B, T, heads, C); steps in elements, a head's channels lie behind one another
    void* data;
    int64_t batch_step, token_step, head_step;
    template <class T> T* at(int64_t b, int64_t head) const { return (T*)data + b * batch_step + head * head_step; }
};

// The rows that the queries of a block see; queries behind the last see nothing.
struct Span {
    int32_t first[QUERIES], last[QUERIES];

    Span(const Shape& s, int64_t b, int64_t q0) {
        for (int64_t i = 0; i < QUERIES; i++) {
            const bool real = q0 + i < s.tokens;
            first[i] = real ? s.first[b * s.tokens + q0 + i] : INT32_MAX;
            last[i] = real ? s.last[b * s.tokens + q0 + i] : -1;
        }
    }

    // Hides the scores (rows r0 and on) of keys that a query does not see.
    void hide(int64_t r0, int64_t rows, float* scores) const {
        if (first[QUERIES - 1] <= r0 && r0 + rows - 1 <= last[0]) return;  // all are seen
        for (int64_t j = 0; j < QUERIES; j += LANES) {
            const Ints from = load(first + j), to = load(last + j);
            for (int64_t r = 0; r < rows; r++) {
                float* p = scores + r * QUERIES + j;
                const Ints row = Ints{} + int32_t(r0 + r);
                store(p, (from <= row) & (row <= to) ? load(p) : Floats{} + HIDDEN);
            }
        }
    }
};

// The queries that see a key at rows k0 to k1, in whole blocks.
struct Seeing {
    int64_t since, until;

    Seeing(const Shape& s, int64_t b, int64_t k0, int64_t k1) {
        const int32_t *first = s.first + b * s.tokens, *last = s.last + b * s.tokens;
        since = down(std::lower_bound(last, last + s.tokens, int32_t(k0)) - last, QUERIES);
        until = up(std::upper_bound(first, first + s.tokens, int32_t(k1 - 1)) - first, QUERIES);
    }
};

template <class U, class T>
void forward(const Shape& s, const Heads& q, const Heads& k, const Heads& v, const Heads& out, float* lse) {
    typedef typename U::Unit Unit;
    constexpr int64_t W = U::WIDTH, Q = QUERIES;
    const int64_t C = s.size, D = C / W;  // D: a row's units
    const int64_t group = s.heads / s.kv_heads, padded = up(s.keys, KEYS), blocks = up(s.tokens, Q) / Q;
    const float scale = LOG2_E / std::sqrt(float(C));
    Memory<Unit> keys(s.batch * s.kv_heads * padded * D), values(s.batch * s.kv_heads * padded * D);
#pragma omp parallel num_threads(s.threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < s.batch * s.kv_heads; i++) {
            int64_t b = i / s.kv_heads, head = i % s.kv_heads;
            pack_rows<U>(k.at<T>(b, head), k.token_step, s.keys, padded, C, keys + i * padded * D);
            pack_channels<U>(v.at<T>(b, head), v.token_step, s.keys, padded, C, values + i * padded * D);
        }
        Memory<Unit> query(D * Q), weights(KEYS / W * Q);
        Memory<float> scores(KEYS * Q), sums(C * Q);
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < s.batch * s.heads * blocks; item++) {
            int64_t b = item / (s.heads * blocks), head = item / blocks % s.heads;
            int64_t q0 = (blocks - 1 - item % blocks) * Q, count = std::min(Q, s.tokens - q0);  // the longest first
            const Unit *k_head = keys + (b * s.kv_heads + head / group) * padded * D;
            const Unit *v_head = values + (b * s.kv_heads + head / group) * padded * D;
            float top[Q], total[Q], shrink[Q];
            const Span span(s, b, q0);
            pack_rows_across<U>(q.at<T>(b, head) + q0 * q.token_step, q.token_step, count, Q, C, query);
            for (int64_t t = q0; t < q0 + count; t++) {  // the next block that this thread is likely to take
                if (t >= s.threads * Q) fetch(q.at<T>(b, head) + (t - s.threads * Q) * q.token_step, C);
                fetch_to_write(out.at<T>(b, head) + t * out.token_step, C);
            }
            std::fill_n(top, Q, LEAST);
            std::fill_n(total, Q, 0.0f);
            std::fill_n((float*)sums, C * Q, 0.0f);
            const int64_t end = up(span.last[count - 1] + 1, ROWS);
            for (int64_t r0 = down(span.first[0], ROWS); r0 < end; r0 += KEYS) {
                int64_t rows = std::min(KEYS, end - r0);
                product<U>(rows, Q, k_head + r0 * D, D, query, Q, scores, Q, D, false);
                span.hide(r0, rows, scores);
                bool shrinks = false;
                for (int64_t j = 0; j < Q; j += LANES) {
                    Floats before = load(top + j), most = before;
                    for (int64_t r = 0; r < rows; r++) {
                        Floats x = load(scores + r * Q + j);
                        most = x > most ? x : most;
                    }
                    Floats less = exp2((before - most) * scale), sum = load(total + j) * less;
                    for (int64_t r = 0; r < rows; r += W) {
                        Floats weight[2];
                        for (int i = 0; i < W; i++) {
                            weight[i] = exp2((load(scores + (r + i) * Q + j) - most) * scale);
                            sum += weight[i];
                        }
                        store((float*)(weights + r / W * Q + j), U::neighbours(weight[0], weight[1]));
                    }
                    store(top + j, most);
                    store(total + j, sum);
                    store(shrink + j, less);
                    for (int i = 0; i < LANES; i++) shrinks |= less[i] != 1.0f;
                }
                if (shrinks)
                    for (int64_t c = 0; c < C; c++)
                        for (int64_t j = 0; j < Q; j += LANES)
                            store(sums + c * Q + j, load(sums + c * Q + j) * load(shrink + j));
                product<U, true>(C, Q, v_head + r0 * D, C, weights, Q, sums, Q, rows / W, true);
            }
            float shares[Q];
            for (int64_t i = 0; i < Q; i++) shares[i] = 1.0f / total[i];
            unpack_across(sums, shares, count, C, out.at<T>(b, head) + q0 * out.token_step, out.token_step);
            for (int64_t i = 0; i < count; i++)
                lse[(b * s.heads + head) * s.tokens + q0 + i] = top[i] * scale + std::log2(total[i]);
        }
    }
}

// With S = q k^T / sqrt(C), P = exp(S - log-sum-exp) and d = dy . y of each query:
//   dv = P^T dy    dS = P (dy v^T - d)    dq = dS k / sqrt(C)    dk = dS^T q / sqrt(C)
//
// Key blocks are taken in turn. The queries that see one lie in a ring, packed when the first key that they see is
// reached and written when the last is passed: with a window, what is in work stays in the caches at any length. The
// query heads of a group add to the gradients of its keys and values in their order, one block behind the other, and
// the last of them writes these.
template <class U, class T>
void backward(const Shape& s, const Heads& q, const Heads& k, const Heads& v, const Heads& out, const float* lse,
              const Heads& grad, const Heads& grad_q, const Heads& grad_k, const Heads& grad_v) {
    typedef typename U::Unit Unit;
    typedef typename U::Element Element;
    constexpr int64_t W = U::WIDTH, Q = QUERIES;
    const int64_t C = s.size, D = C / W, group = s.heads / s.kv_heads, padded_keys = up(s.keys, KEYS);
    const float root = 1.0f / std::sqrt(float(C)), scale = LOG2_E * root;
    float roots[Q];
    std::fill_n(roots, Q, root);
    const int64_t kv_rows = s.batch * s.kv_heads * padded_keys;
    Memory<Unit> keys(kv_rows * D), keys_across(kv_rows * D), values(kv_rows * D);
    Memory<float> group_k(group > 1 ? kv_rows * C : 0), group_v(group > 1 ? kv_rows * C : 0);
    std::vector<std::atomic<int64_t>> added(s.batch * s.heads);  // how many rows a head has added to its group's sums
    std::atomic<int64_t> taken = 0;
    int64_t ring = Q;  // the most queries that are in work at a time
    for (int64_t b = 0; b < s.batch; b++)
        for (int64_t k0 = 0; k0 < s.keys; k0 += KEYS) {
            const Seeing seeing(s, b, k0, std::min(k0 + KEYS, s.keys));
            ring = std::max(ring, seeing.until - seeing.since);
        }
#pragma omp parallel num_threads(s.threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < s.batch * s.kv_heads; i++) {
            int64_t b = i / s.kv_heads, head = i % s.kv_heads;
            pack_rows<U>(k.at<T>(b, head), k.token_step, s.keys, padded_keys, C, keys + i * padded_keys * D);
            pack_channels<U>(k.at<T>(b, head), k.token_step, s.keys, padded_keys, C, keys_across + i * padded_keys * D);
            pack_rows<U>(v.at<T>(b, head), v.token_step, s.keys, padded_keys, C, values + i * padded_keys * D);
        }
        Memory<Unit> query(ring * D), query_across(ring * D), dy(ring * D), dy_across(ring * D);
        Memory<Unit> weights(KEYS * Q / W), slopes(KEYS * Q / W), slopes_across(KEYS * Q / W);
        Memory<float> scores(KEYS * Q), inner(KEYS * Q), sums_q(ring * C), log_sums(ring), dots(ring);
        Memory<float> sums_k(KEYS * C), sums_v(KEYS * C);
        for (int64_t item; (item = taken++) < s.batch * s.heads;) {  // in order: a head may wait for the one before
            int64_t b = item / s.heads, head = item % s.heads, kv = b * s.kv_heads + head / group;
            const Unit *k_head = keys + kv * padded_keys * D, *k_head_across = keys_across + kv * padded_keys * D;
            const Unit* v_head = values + kv * padded_keys * D;
            const T *q_rows = q.at<T>(b, head), *y_rows = out.at<T>(b, head), *dy_rows = grad.at<T>(b, head);
            const int32_t* last = s.last + b * s.tokens;
            int64_t packed = 0, done = 0;  // queries before these rows are packed; are written
            auto pack = [&](int64_t q0) {
                const int64_t at = q0 % ring, count = std::min(Q, s.tokens - q0);
                pack_rows_across<U>(q_rows + q0 * q.token_step, q.token_step, count, Q, C, query + at * D);
                pack_channels<U>(q_rows + q0 * q.token_step, q.token_step, count, Q, C, query_across + at * D);
                pack_rows_across<U>(dy_rows + q0 * grad.token_step, grad.token_step, count, Q, C, dy + at * D);
                pack_channels<U>(dy_rows + q0 * grad.token_step, grad.token_step, count, Q, C, dy_across + at * D);
                std::fill_n(log_sums + at, Q, 0.0f);
                std::fill_n(dots + at, Q, 0.0f);
                for (int64_t t = q0; t < q0 + count; t++) {
                    log_sums[at + t - q0] = lse[item * s.tokens + t];
                    dots[at + t - q0] = dot(dy_rows + t * grad.token_step, y_rows + t * out.token_step, C);
                }
                std::fill_n(sums_q + at * C, Q * C, 0.0f);
                for (int64_t t = q0 + Q; t < std::min(q0 + 2 * Q, s.tokens); t++) {
                    fetch(q_rows + t * q.token_step, C);
                    fetch(y_rows + t * out.token_step, C);
                    fetch(dy_rows + t * grad.token_step, C);
                }
            };
            auto write = [&](int64_t q0) {
                T* y = grad_q.at<T>(b, head) + q0 * grad_q.token_step;
                unpack_across(sums_q + q0 % ring * C, roots, std::min(Q, s.tokens - q0), C, y, grad_q.token_step);
            };
            auto add = [&](int64_t k0, int64_t k1) {
                const bool starts = head % group == 0, ends = head % group == group - 1;
                float *all_k = group_k + (kv * padded_keys + k0) * C, *all_v = group_v + (kv * padded_keys + k0) * C;
                T* to_k = grad_k.at<T>(b, head / group) + k0 * grad_k.token_step;
                T* to_v = grad_v.at<T>(b, head / group) + k0 * grad_v.token_step;
                while (!starts && added[item - 1] < k1) std::this_thread::yield();
                for (int64_t t = 0; t < k1 - k0; t++)
                    for (int64_t c = 0; c < C; c += LANES) {
                        const int64_t at = t * C + c;
                        Floats sum_k = load(sums_k + at), sum_v = load(sums_v + at);
                        if (!starts) sum_k += load(all_k + at), sum_v += load(all_v + at);
                        if (ends) {
                            store(to_k + t * grad_k.token_step + c, sum_k * root);
                            store(to_v + t * grad_v.token_step + c, sum_v);
                        } else {
                            store(all_k + at, sum_k);
                            store(all_v + at, sum_v);
                        }
                    }
                added[item] = k1;
            };
            for (int64_t k0 = 0; k0 < s.keys; k0 += KEYS) {
                std::fill_n((float*)sums_k, KEYS * C, 0.0f);
                std::fill_n((float*)sums_v, KEYS * C, 0.0f);
                const int64_t k1 = std::min(k0 + KEYS, s.keys);
                const Seeing seeing(s, b, k0, k1);
                for (; done < seeing.since; done += Q) write(done);
                for (; packed < seeing.until; packed += Q) pack(packed);
                for (int64_t q0 = seeing.since; q0 < seeing.until; q0 += Q) {
                    const Span span(s, b, q0);
                    const int64_t seen = last[std::min(q0 + Q, s.tokens) - 1] + 1;
                    const int64_t r0 = std::max(k0, down(span.first[0], ROWS));
                    const int64_t rows = up(std::min(k1, seen), ROWS) - r0, slot = q0 % ring;
                    if (rows <= 0) continue;
                    product<U>(rows, Q, k_head + r0 * D, D, query + slot * D, Q, scores, Q, D, false);
                    product<U>(rows, Q, v_head + r0 * D, D, dy + slot * D, Q, inner, Q, D, false);
                    span.hide(r0, rows, scores);
                    for (int64_t j = 0; j < Q; j += LANES) {
                        Floats log_sum = load(log_sums + slot + j), inner_dy = load(dots + slot + j);
                        for (int64_t r = 0; r < rows; r += W) {
                            Floats slope[2];
                            for (int i = 0; i < W; i++) {
                                Floats weight = exp2(load(scores + (r + i) * Q + j) * scale - log_sum);
                                slope[i] = weight * (load(inner + (r + i) * Q + j) - inner_dy);
                                store((Element*)(Unit*)weights + (r + i) * Q + j, weight);
                                store((Element*)(Unit*)slopes + (r + i) * Q + j, slope[i]);
                            }
                            store((float*)(slopes_across + r / W * Q + j), U::neighbours(slope[0], slope[1]));
                        }
                    }
                    const int64_t at = (r0 - k0) * C;
                    product<U>(rows, C, weights, Q / W, dy_across + slot * D, C, sums_v + at, C, Q / W, true);
                    product<U>(rows, C, slopes, Q / W, query_across + slot * D, C, sums_k + at, C, Q / W, true);
                    product<U, true>(C, Q, k_head_across + r0 * D, C, slopes_across, Q, sums_q + slot * C, Q, rows / W,
                                     true);
                }
                add(k0, k1);
            }
            for (; done < s.tokens; done += Q) write(done);
        }
    }
}

}  // namespace

extern "C" {

void attend_forward(const Shape* s, int is_bf16, const Heads* x, float* lse) {  // q, k, v, out
    if (is_bf16) forward<Bfloat16, bf16>(*s, x[0], x[1], x[2], x[3], lse);
    else forward<Single, float>(*s, x[0], x[1], x[2], x[3], lse);
}

void attend_backward(const Shape* s, int is_bf16, const Heads* x, const float* lse) {  // ..., dout, dq, dk, dv
    if (is_bf16) backward<Bfloat16, bf16>(*s, x[0], x[1], x[2], x[3], lse, x[4], x[5], x[6], x[7]);
    else backward<Single, float>(*s, x[0], x[1], x[2], x[3], lse, x[4], x[5], x[6], x[7]);
}
}
