// Products of the experts: each block of rows with a matrix of its own, forward and both gradients.
//
// Libraries prepare a product for its shape, and experts have new shapes in every pass. Here nothing depends on how
// many rows an expert has. Each output is summed in one order, so threads change no bit.
//
// E experts, R rows sorted by expert; w (E, outs, ins) may be fp32 where rows are bf16, and is rounded as it is packed
// where bf16 is multiplied as such.

#include <omp.h>

#include "products.h"

namespace {

constexpr int64_t EXPERTS = 8;  // whose gradients are computed before the next ones': the last cache holds their rows
// Rows and units of a step of `rows_product`; rows to sum, most outs and most ins of one of `backward_weight`, whose
// sums then stay in the second cache.
constexpr int64_t BLOCK = 64, DEPTH = 512, SUMMED = 256, TALL = 320, WIDE = 256;

struct Grouped {
    int64_t experts, outs, ins;
    const int32_t* ends;  // (E): where each expert's rows end
    int32_t threads, start;  // the row at which the first expert's begin
    int64_t begin(int64_t e) const { return e ? ends[e - 1] : start; }
    Grouped part(int64_t e, int64_t count) const { return {count, outs, ins, ends + e, threads, int32_t(begin(e))}; }
};

// y (R, outs) = rows x (R, ins) times a panel for each expert and block of columns, packed by `pack`(e, column, count,
// out), which returns the panel's step.
template <class U, class T, class Pack>
void rows_product(const Grouped& g, int64_t outs, int64_t ins, const T* x, T* y, Pack pack) {
    typedef typename U::Unit Unit;
    const int64_t units = ins / U::WIDTH, panels = up(outs, COLUMNS) / COLUMNS, all = g.ends[g.experts - 1];
#pragma omp parallel num_threads(g.threads)
    {
        Memory<Unit> panel(units * COLUMNS), copied(BLOCK * units);
        alignas(64) float sums[BLOCK * COLUMNS];
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < g.experts * panels; item++) {
            const int64_t e = item / panels, column = item % panels * COLUMNS, end = g.ends[e];
            const int64_t count = std::min(COLUMNS, outs - column);
            if (g.begin(e) == end) continue;
            const int64_t step = pack(e, column, count, (Unit*)panel);
            for (int64_t r0 = g.begin(e); r0 < end; r0 += BLOCK) {
                const int64_t rows = std::min(BLOCK, end - r0);
                const Unit* a = (const Unit*)(x + r0 * ins);
                if (rows % ROWS || sizeof(T) != sizeof(typename U::Element)) {
                    pack_rows<U>(x + r0 * ins, ins, rows, up(rows, ROWS), ins, copied);
                    a = copied;
                }
                for (int64_t i = 0; i < rows; i += ROWS) {
                    const int64_t now = r0 + i, ahead = std::min(now + BLOCK, all);
                    if (item % panels < g.threads)  // this thread's first panel of the expert
                        fetch(x + ahead * ins, std::min(ROWS, all - ahead) * ins);
                    for (int64_t r = now; r < std::min(now + ROWS, end); r++)
                        fetch_to_write(y + r * outs + column, count);
                    for (int64_t k = 0; k < units; k += DEPTH)
                        product<U>(ROWS, count, a + i * units + k, units, panel + k * step, step, sums + i * COLUMNS,
                                   COLUMNS, std::min(DEPTH, units - k), k > 0);
                }
                for (int64_t r = 0; r < rows; r++)
                    for (int64_t j = 0; j < count; j += LANES)
                        store(y + (r0 + r) * outs + column + j, load(sums + r * COLUMNS + j));
            }
        }
    }
}

template <class T, class S> void forward(const Grouped& g, const T* x, const S* w, T* y) {
    typedef typename UnitsOf<T>::Units U;
    auto pack = [&](int64_t e, int64_t column, int64_t count, typename U::Unit* out) {
        pack_rows_across<U>(w + (e * g.outs + column) * g.ins, g.ins, count, count, g.ins, out);
        return COLUMNS;
    };
    rows_product<U>(g, g.outs, g.ins, x, y, pack);
}

template <class T, class S> void backward_rows(const Grouped& g, const T* grad, const S* w, T* grad_x) {
    typedef typename UnitsOf<T>::Units U;
    auto pack = [&](int64_t e, int64_t column, int64_t count, typename U::Unit* out) {
        pack_channels<U>(w + e * g.outs * g.ins + column, g.ins, g.outs, g.outs, count, out);
        return count;
    };
    rows_product<U>(g, g.ins, g.outs, grad, grad_x, pack);
}

// grad_w[e] (outs, ins) = grad^T x over the expert's rows, or that added to it.
template <class T, class S>
void backward_weight(const Grouped& g, const T* x, const T* grad, S* grad_w, bool add = false) {
    typedef typename UnitsOf<T>::Units U;
    typedef typename U::Unit Unit;
    const int64_t talls = up(g.outs, TALL) / TALL, wides = up(g.ins, WIDE) / WIDE, W = U::WIDTH;
    const int64_t tall = up(up(g.outs, talls) / talls, COLUMNS), wide = up(up(g.ins, wides) / wides, COLUMNS);
#pragma omp parallel num_threads(g.threads)
    {
        Memory<Unit> across(SUMMED / W * tall), panels(SUMMED / W * wide);
        Memory<float> sums(tall * wide);
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < g.experts * talls * wides; item++) {
            const int64_t e = item / (talls * wides), row = item / wides % talls * tall, column = item % wides * wide;
            const int64_t height = std::min(tall, g.outs - row), width = std::min(wide, g.ins - column);
            if (g.begin(e) == g.ends[e]) std::fill_n((float*)sums, height * wide, 0.0f);
            for (int64_t r0 = g.begin(e); r0 < g.ends[e]; r0 += SUMMED) {
                const int64_t rows = std::min(SUMMED, g.ends[e] - r0), depth = up(rows, W) / W;
                pack_channels<U>(grad + r0 * g.outs + row, g.outs, rows, depth * W, height, across);
                pack_panels<U>(x + r0 * g.ins + column, g.ins, rows, width, panels);
                for (int64_t j = 0; j < width; j += COLUMNS)
                    product<U, true>(height, std::min(COLUMNS, width - j), across, height, panels + j * depth, COLUMNS,
                                     sums + j, wide, depth, r0 > g.begin(e));
            }
            for (int64_t i = 0; i < height; i++)
                for (int64_t j = 0; j < width; j += LANES) {
                    S* to = grad_w + (e * g.outs + row + i) * g.ins + column + j;
                    fetch_to_write(to + 16 * g.ins, LANES);
                    store(to, add ? load(to) + load(sums + i * wide + j) : load(sums + i * wide + j));
                }
        }
    }
}

// Calls f with the types of rows and weights.
template <class F> void typed(int rows_bf16, int weights_bf16, F f) {
    if (!rows_bf16) f(float(), float());
    else if (weights_bf16) f(bf16(), bf16());
    else f(bf16(), float());
}

}  // namespace

extern "C" {

void grouped_forward(const Grouped* g, int rows_bf16, int weights_bf16, const void* x, const void* w, void* y) {
    typed(rows_bf16, weights_bf16, [&](auto t, auto s) {
        forward(*g, (const decltype(t)*)x, (const decltype(s)*)w, (decltype(t)*)y);
    });
}

void grouped_backward(const Grouped* g, int rows_bf16, int weights_bf16, const void* x, const void* w, const void* grad,
                      void* grad_x, void* grad_w) {  // either gradient may be null
    typed(rows_bf16, weights_bf16, [&](auto t, auto s) {
        typedef decltype(t) T;
        typedef decltype(s) S;
        for (int64_t e = 0; e < g->experts; e += EXPERTS) {
            const Grouped part = g->part(e, std::min(EXPERTS, g->experts - e));
            const int64_t from = e * g->outs * g->ins;
            if (grad_x) backward_rows(part, (const T*)grad, (const S*)w + from, (T*)grad_x);
            if (grad_w) backward_weight(part, (const T*)x, (const T*)grad, (S*)grad_w + from);
        }
    });
}

// grad_w (outs, ins), fp32, += grad^T x.
void add_product(const Grouped* g, int rows_bf16, const void* x, const void* grad, float* grad_w) {
    typed(rows_bf16, 0, [&](auto t, auto) {
        typedef decltype(t) T;
        backward_weight(*g, (const T*)x, (const T*)grad, grad_w, true);
    });
}
}
