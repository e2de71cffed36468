// What lies between matrix products, forward and backward, each in one pass over memory: norms, rotary positions,
// gates, SwiGLU, and the way of rows to their experts and back.
//
// Arithmetic is fp32, results are rounded once. Gradients of parameters are summed over CHUNK rows at a time, and
// those sums are the caller's to add: the number of threads changes no bit.
//
// N rows, D columns, H query heads, K kv heads, C head dim, R routed rows.

#include <omp.h>

#include <vector>

#include "vectors.h"

namespace {

constexpr int64_t CHUNK = 128;

// NaN stays NaN.
INLINE Floats clipped(Floats x, Floats most) { return x > most ? most : x; }
INLINE Floats clipped(Floats x, Floats most, Floats least) { return x < least ? least : clipped(x, most); }

INLINE Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

template <class T> INLINE float inverse_rms(const T* x, int64_t size, float eps) {
    return 1.0f / std::sqrt(dot(x, x, size) / size + eps);
}

// With n = x / rms(x): y = n w. dx = (g - n mean(g n)) / rms(x) where g = dy w; dw += dy n.
template <class T, class S>
INLINE void norm_backward(const T* x, const float* weight, const S* grad, int64_t size, float eps, T* grad_x,
                          float* grad_weight) {
    const float inverse = inverse_rms(x, size, eps);
    Floats sums = {};
    each(size, [&](int64_t i) { sums += load(grad + i) * load(weight + i) * load(x + i); });
    const float mean = total(sums) * inverse * inverse / size;
    each(size, [&](int64_t i) {
        Floats value = load(x + i), slope = load(grad + i);
        store(grad_weight + i, load(grad_weight + i) + slope * value * inverse);
        store(grad_x + i, (slope * load(weight + i) - value * mean) * inverse);
    });
}

template <class T>
void norm(const T* x, const float* weight, int64_t rows, int64_t size, float eps, T* y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < rows; n++) {
        const T* from = x + n * size;
        const float inverse = inverse_rms(from, size, eps);
        each(size, [&](int64_t i) { store(y + n * size + i, load(from + i) * inverse * load(weight + i)); });
    }
}

template <class T>
void norm_grad(const T* x, const float* weight, const T* grad, int64_t rows, int64_t size, float eps, T* grad_x,
               float* sums, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t chunk = 0; chunk < (rows + CHUNK - 1) / CHUNK; chunk++)
        for (int64_t n = chunk * CHUNK; n < std::min(rows, (chunk + 1) * CHUNK); n++)
            norm_backward(x + n * size, weight, grad + n * size, size, eps, grad_x + n * size, sums + chunk * size);
}

// Turns the first 2 * `half` channels of a head by angles whose cosines and sines are given; `way` -1 turns back.
template <class T>
INLINE void turn(float* head, const T* cosines, const T* sines, int64_t half, float way) {
    for (int64_t i = 0; i < half; i++) {
        float a = head[i], b = head[i + half], c = widen(cosines[i]), s = widen(sines[i]) * way;
        head[i] = a * c - b * s;
        head[i + half] = b * c + a * s;
    }
}

struct Turned {  // (N, heads + kv heads + kv heads, C): queries and keys, which are normed and turned, and values
    int64_t rows, heads, kv_heads, size, half;
    float eps;
    int threads;
};

constexpr int64_t MOST_SIZE = 1024;  // channels of a head

template <class T>
void turned(const Turned& s, const T* x, const float* weight_q, const float* weight_k, const T* cosines,
            const T* sines, T* y) {
    const int64_t normed = s.heads + s.kv_heads, all = normed + s.kv_heads, C = s.size;
#pragma omp parallel for num_threads(s.threads) schedule(static)
    for (int64_t n = 0; n < s.rows; n++)
        for (int64_t h = 0; h < normed; h++) {
            float head[MOST_SIZE];
            const T* from = x + (n * all + h) * C;
            const float *weight = h < s.heads ? weight_q : weight_k, inverse = inverse_rms(from, C, s.eps);
            each(C, [&](int64_t i) { store(head + i, load(from + i) * inverse * load(weight + i)); });
            turn(head, cosines + n * s.half, sines + n * s.half, s.half, 1.0f);
            each(C, [&](int64_t i) { store(y + (n * normed + h) * C + i, load(head + i)); });
        }
}

// `sums`: (chunks, 2, C), of the queries' weight and of the keys'.
template <class T>
void turned_grad(const Turned& s, const T* x, const float* weight_q, const float* weight_k, const T* cosines,
                 const T* sines, const T* grad_q, const T* grad_k, const T* grad_v, T* grad_x, float* sums) {
    const int64_t all = s.heads + 2 * s.kv_heads, C = s.size;
#pragma omp parallel for num_threads(s.threads) schedule(static)
    for (int64_t chunk = 0; chunk < (s.rows + CHUNK - 1) / CHUNK; chunk++)
        for (int64_t n = chunk * CHUNK; n < std::min(s.rows, (chunk + 1) * CHUNK); n++) {
            for (int64_t h = 0; h < s.heads + s.kv_heads; h++) {
                float head[MOST_SIZE];
                const bool query = h < s.heads;
                const T* grad = query ? grad_q + (n * s.heads + h) * C : grad_k + (n * s.kv_heads + h - s.heads) * C;
                each(C, [&](int64_t i) { store(head + i, load(grad + i)); });
                turn(head, cosines + n * s.half, sines + n * s.half, s.half, -1.0f);
                const int64_t at = (n * all + h) * C;
                norm_backward(x + at, query ? weight_q : weight_k, (const float*)head, C, s.eps, grad_x + at,
                              sums + (chunk * 2 + !query) * C);
            }
            memcpy(grad_x + (n * all + s.heads + s.kv_heads) * C, grad_v + n * s.kv_heads * C,
                   s.kv_heads * C * sizeof(T));
        }
}

// y[n] = the sum of the squares of row n.
template <class T> void squares(const T* x, int64_t rows, int64_t size, float* y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < rows; n++) y[n] = dot(x + n * size, x + n * size, size);
}

// y = x sigmoid(z), z one number for each head of C channels.
template <class T> void gated(const T* x, const T* z, int64_t heads, int64_t size, T* y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t h = 0; h < heads; h++) {
        const float gate = 1.0f / (1.0f + std::exp(-widen(z[h])));
        each(size, [&](int64_t i) { store(y + h * size + i, load(x + h * size + i) * gate); });
    }
}

template <class T>
void gated_grad(const T* x, const T* z, const T* grad, int64_t heads, int64_t size, T* grad_x, T* grad_z, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t h = 0; h < heads; h++) {
        const float gate = 1.0f / (1.0f + std::exp(-widen(z[h])));
        narrow(dot(x + h * size, grad + h * size, size) * gate * (1.0f - gate), grad_z + h);
        each(size, [&](int64_t i) { store(grad_x + h * size + i, load(grad + h * size + i) * gate); });
    }
}

// y = min(silu(gate), clip) * clamp(up, clip), without limits where clip is 0; x: (N, gate and up).
template <class T> void swiglu(const T* x, int64_t rows, int64_t size, float clip, T* y, int threads) {
    const Floats most = Floats{} + (clip > 0 ? clip : INFINITY);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < rows; n++)
        each(size, [&](int64_t i) {
            Floats gate = load(x + n * 2 * size + i), up = load(x + n * 2 * size + size + i);
            Floats silu = gate * sigmoid(gate);
            store(y + n * size + i, clipped(silu, most) * clipped(up, most, -most));
        });
}

template <class T>
void swiglu_grad(const T* x, const T* grad, int64_t rows, int64_t size, float clip, T* grad_x, int threads) {
    const Floats most = Floats{} + (clip > 0 ? clip : INFINITY);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < rows; n++)
        each(size, [&](int64_t i) {
            const int64_t at = n * 2 * size + i;
            Floats gate = load(x + at), up = load(x + at + size), slope = load(grad + n * size + i);
            Floats share = sigmoid(gate), silu = gate * share;
            Floats to_gate = slope * clipped(up, most, -most) * (share + silu * (1.0f - share));
            Floats to_up = slope * clipped(silu, most);
            store(grad_x + at, silu <= most ? to_gate : Floats{});
            store(grad_x + at + size, (up >= -most) & (up <= most) ? to_up : Floats{});
        });
}

// y[r] = x[from[r]].
template <class T> void gather(const T* x, const int64_t* from, int64_t rows, int64_t size, T* y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++) memcpy(y + r * size, x + from[r] * size, size * sizeof(T));
}

// y[n] = sum over k of weight[n, k] x[place[n, k]]; without weights, the plain sum.
template <class T>
void gather_sum(const T* x, const int64_t* place, const float* weight, int64_t rows, int64_t top_k, int64_t size, T* y,
                int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < rows; n++) {
        for (int64_t k = (n + 1) * top_k; k < std::min(n + 2, rows) * top_k; k++) fetch(x + place[k] * size, size);
        each(size, [&](int64_t i) {
            Floats sums = {};
            for (int64_t k = n * top_k; k < (n + 1) * top_k; k++)
                sums += load(x + place[k] * size + i) * (weight ? weight[k] : 1.0f);
            store(y + n * size + i, sums);
        });
    }
}

// The gradient of that: dx[place[n, k]] = weight[n, k] dy[n], dweight[n, k] = dy[n] . x[place[n, k]].
template <class T>
void gather_sum_grad(const T* x, const int64_t* place, const float* weight, const T* grad, int64_t rows, int64_t top_k,
                     int64_t size, T* grad_x, float* grad_weight, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < rows; n++) {
        for (int64_t k = (n + 1) * top_k; k < std::min(n + 2, rows) * top_k; k++) {
            fetch(x + place[k] * size, size);
            fetch_to_write(grad_x + place[k] * size, size);
        }
        for (int64_t k = n * top_k; k < (n + 1) * top_k; k++) {
            const T *row = x + place[k] * size, *slope = grad + n * size;
            grad_weight[k] = dot(row, slope, size);
            each(size, [&](int64_t i) { store(grad_x + place[k] * size + i, load(slope + i) * weight[k]); });
        }
    }
}

// Rows of logits turn into the gradient of -log p[target]; `loss` (N) takes that, of at most 87 nats.
template <class T>
void cross_entropy(T* logits, const int64_t* targets, int64_t rows, int64_t size, float* loss, int threads) {
    constexpr float LEAST = 1.1754944e-38f;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> powers(size);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < rows; n++) {
            T* x = logits + n * size;
            Floats most = Floats{} - INFINITY, sums = {};
            each(size, [&](int64_t i) { most = larger(most, load(x + i)); });
            const float top = largest(most), target = widen(x[targets[n]]);
            each(size, [&](int64_t i) {
                Floats below = load(x + i) - top, power = exponential(below);
                store(&powers[i], power);
                sums += power + (below - below);  // which is NaN where a logit is no number
            });
            const float share = 1.0f / total(sums), p = exponential(target - top) * share;
            each(size, [&](int64_t i) { store(x + i, load(&powers[i]) * share); });
            narrow(p - 1.0f, x + targets[n]);
            loss[n] = -std::log(p < LEAST ? LEAST : p);
        }
    }
}

}  // namespace

#define BOTH(name, parameters, ...)                              \
    void name##_float32 parameters { typedef float T; __VA_ARGS__; } \
    void name##_bfloat16 parameters { typedef bf16 T; __VA_ARGS__; }

extern "C" {

BOTH(norm, (const void* x, const float* w, int64_t rows, int64_t size, float eps, void* y, int threads),
     norm((const T*)x, w, rows, size, eps, (T*)y, threads))
BOTH(norm_grad, (const void* x, const float* w, const void* grad, int64_t rows, int64_t size, float eps, void* grad_x,
                 float* sums, int threads),
     norm_grad((const T*)x, w, (const T*)grad, rows, size, eps, (T*)grad_x, sums, threads))
BOTH(turned, (const void* x, const float* q, const float* k, const void* cosines, const void* sines, int64_t rows,
              int64_t heads, int64_t kv_heads, int64_t size, int64_t half, float eps, void* y, int threads),
     turned({rows, heads, kv_heads, size, half, eps, threads}, (const T*)x, q, k, (const T*)cosines, (const T*)sines,
            (T*)y))
BOTH(turned_grad, (const void* x, const float* q, const float* k, const void* cosines, const void* sines, int64_t rows,
                   int64_t heads, int64_t kv_heads, int64_t size, int64_t half, float eps, const void* grad_q,
                   const void* grad_k, const void* grad_v, void* grad_x, float* sums, int threads),
     turned_grad({rows, heads, kv_heads, size, half, eps, threads}, (const T*)x, q, k, (const T*)cosines,
                 (const T*)sines, (const T*)grad_q, (const T*)grad_k, (const T*)grad_v, (T*)grad_x, sums))
BOTH(squares, (const void* x, int64_t rows, int64_t size, float* y, int threads),
     squares((const T*)x, rows, size, y, threads))
BOTH(gated, (const void* x, const void* z, int64_t heads, int64_t size, void* y, int threads),
     gated((const T*)x, (const T*)z, heads, size, (T*)y, threads))
BOTH(gated_grad, (const void* x, const void* z, const void* grad, int64_t heads, int64_t size, void* grad_x,
                  void* grad_z, int threads),
     gated_grad((const T*)x, (const T*)z, (const T*)grad, heads, size, (T*)grad_x, (T*)grad_z, threads))
BOTH(swiglu, (const void* x, int64_t rows, int64_t size, float clip, void* y, int threads),
     swiglu((const T*)x, rows, size, clip, (T*)y, threads))
BOTH(swiglu_grad, (const void* x, const void* grad, int64_t rows, int64_t size, float clip, void* grad_x, int threads),
     swiglu_grad((const T*)x, (const T*)grad, rows, size, clip, (T*)grad_x, threads))
BOTH(gather, (const void* x, const int64_t* from, int64_t rows, int64_t size, void* y, int threads),
     gather((const T*)x, from, rows, size, (T*)y, threads))
BOTH(gather_sum, (const void* x, const int64_t* place, const float* weight, int64_t rows, int64_t top_k, int64_t size,
                  void* y, int threads),
     gather_sum((const T*)x, place, weight, rows, top_k, size, (T*)y, threads))
BOTH(gather_sum_grad, (const void* x, const int64_t* place, const float* weight, const void* grad, int64_t rows,
                       int64_t top_k, int64_t size, void* grad_x, float* grad_weight, int threads),
     gather_sum_grad((const T*)x, place, weight, (const T*)grad, rows, top_k, size, (T*)grad_x, grad_weight, threads))
BOTH(cross_entropy, (void* logits, const int64_t* targets, int64_t rows, int64_t size, float* loss, int threads),
     cross_entropy((T*)logits, targets, rows, size, loss, threads))
}
