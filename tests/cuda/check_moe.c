/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Router, grouping, experts, activation and sum on the device against ref: few and many rows an expert, hashed layers,
 * ties and NaN scores, experts of another format than the shared one, experts that are not there.
 */
#include <math.h>

#include "weights.h"

void check_moe(void);

static void route(int32_t n_tok, int32_t n_exp, int32_t top_k, int how) {
    size_t n = (size_t)(n_tok * n_exp), k = (size_t)(n_tok * top_k);
    int32_t vocab = 7, bytes = check_below(2) ? 8 : 4, *ids[2], *tokens = check_aligned(4 * (size_t)n_tok, 4);
    float *logits = check_aligned(4 * n, 4), *bias = how & 1 ? check_aligned(4 * (size_t)n_exp, 4) : NULL;
    float *weights[2], *scores[2];
    uint8_t *table = how & 2 ? check_bytes((size_t)(vocab * top_k * bytes)) : NULL;
    for (int i = 0; i < 2; i++) {
        ids[i] = check_aligned(4 * k, 4);
        weights[i] = check_aligned(4 * k, 4);
        scores[i] = check_aligned(4 * n, 4);
    }
    check_fill_f32(logits, n, CHECK_NORMAL);
    for (size_t i = 0; how & 4 && i < n; i++) { /* ties, and what no model has */
        static const float values[] = {-30.0f, -0.0f, 0.0f, 1.0f, 25.0f};
        logits[i] = check_below(12) ? values[check_below(5)] : check_below(2) ? NAN : INFINITY;
    }
    for (int32_t e = 0; bias && e < n_exp; e++)
        bias[e] = (float)between(-4, 4);
    for (int32_t i = 0; table && i < vocab * top_k; i++) {
        int64_t id = between(0, n_exp - 1);
        memcpy(table + i * bytes, &id, (size_t)bytes); /* little-endian, as files are */
    }
    for (int32_t t = 0; t < n_tok; t++) {
        int32_t forced[64];
        tokens[t] = between(0, vocab - 1);
        for (int32_t j = 0; table && j < top_k; j++)
            memcpy(&forced[j], table + (tokens[t] * top_k + j) * bytes, 4);
        ref()->router(&(struct dsv4_router_args){
            .ids = ids[0] + t * top_k, .weights = weights[0] + t * top_k, .scores = scores[0] + t * n_exp,
            .logits = logits + t * n_exp, .bias = bias, .forced = table ? forced : NULL, .n_exp = n_exp, .top_k = top_k,
            .route_scale = 1.5f});
    }
    RUN(router, .ids = ids[1], .weights = weights[1], .scores = scores[1], .logits = logits, .bias = bias, .table = table,
        .tokens = tokens, .n_tok = n_tok, .n_exp = n_exp, .top_k = top_k, .table_bytes = bytes, .route_scale = 1.5f);
    same("router ids", ids[1], ids[0], k, 4);
    same_f32("router weights", weights[1], weights[0], k);
    same_f32("router scores", scores[1], scores[0], n);
    check_reset();
}

/* What grouping made, against its description. */
static void check_groups(const struct dsv4_cuda_group_args *g) {
    int32_t per_tok = g->top_k + 1, n_row = g->n_tok * per_tok, row = 0, tile = 0;
    for (int32_t e = 0; e <= g->n_exp; e++) {
        check_true(g->group_first[e] == row, "expert %d begins at %d, wanted %d", e, g->group_first[e], row);
        for (int32_t i = 0; i < g->n_tok * g->top_k && e < g->n_exp; i++) {
            if (g->ids[i] != e)
                continue;
            check_true(g->row_tok[row] == i / g->top_k && g->row_weight[row] == g->weights[i], "row %d", row);
            row++;
        }
        for (int32_t t = 0; t < g->n_tok && e == g->n_exp; t++, row++)
            check_true(g->row_tok[row] == t && g->row_weight[row] == 1.0f, "row %d of the shared expert", row);
        for (int32_t at = g->group_first[e]; at < row; at += g->tile_tok, tile++) {
            int32_t n = row - at < g->tile_tok ? row - at : g->tile_tok;
            const struct dsv4_cuda_tile *t = &g->tiles[tile];
            check_true(t->expert == e && t->first == at && t->n == n, "tile %d", tile);
        }
    }
    check_true(row == n_row && g->group_first[g->n_exp + 1] == n_row, "rows");
    check_true(*g->n_tile == tile, "tiles: got %d, wanted %d", *g->n_tile, tile);
    int32_t most = DSV4_CUDA_TILES(g->n_tok, g->n_exp, g->top_k, g->tile_tok);
    check_true(tile <= most, "tiles: got %d, room for %d", tile, most);
    for (int32_t t = 0; t < g->n_tok; t++)
        for (int32_t j = 0; j < per_tok; j++) {
            int32_t at = g->tok_rows[t * per_tok + j];
            check_true(g->row_tok[at] == t && (j == 0 || g->tok_rows[t * per_tok + j - 1] < at), "rows of token %d", t);
        }
}

/* A whole sublayer from the router's choice on; of two, the first is ref's and the second the device's. */
struct sublayer {
    int32_t n_tok, n_exp, top_k, d, width, tile_tok, hc;
    int32_t cold;             /* an expert that is not there, or -1 */
    int quant[2];             /* activations of the routed experts, and of the shared one */
    struct dsv4_weight *w[3]; /* gate, up, down [n_exp + 1], the shared one last */
    struct dsv4_cuda_group_args group;
    dsv4_bf16 *x, *xq;        /* [n_tok][d] */
    float *post, *comb;
    dsv4_bf16 *mid[2][3];     /* gate, up, swiglu [rows][width] */
    dsv4_bf16 *out[2];        /* down [rows][d] */
    dsv4_bf16 *y[2], *streams[2];
};

static int32_t rows_of(const struct sublayer *s) {
    return s->n_tok * (s->top_k + 1);
}

static void random_experts(struct sublayer *s) {
    s->cold = check_below(2) ? between(0, s->n_exp - 1) : -1;
    const struct weight_case *routed = &weight_cases[check_below(2) ? 7 : check_below(WEIGHT_CASES)];
    const struct weight_case *other = &weight_cases[check_below(2) ? 0 : check_below(WEIGHT_CASES)];
    for (int i = 0; i < 3; i++) {
        s->w[i] = check_aligned((size_t)(s->n_exp + 1) * sizeof *s->w[i], 8);
        for (int32_t e = 0; e <= s->n_exp; e++)
            s->w[i][e] = random_weight(e < s->n_exp ? routed : other, i < 2 ? s->width : s->d, i < 2 ? s->d : s->width,
                                       CHECK_NORMAL, 0, 0);
        if (s->cold >= 0)
            s->w[i][s->cold].data = NULL;
    }
    s->quant[0] = routed->rule != DSV4_SCALE_NONE;
    s->quant[1] = other->rule != DSV4_SCALE_NONE;
}

/* Every token's experts, none twice, and their weights. */
static void random_choices(const struct sublayer *s, int32_t *ids, float *weights) {
    for (int32_t t = 0; t < s->n_tok; t++)
        for (int32_t j = 0; j < s->top_k; j++) {
            int32_t *id = &ids[t * s->top_k + j], again = 1;
            while (again) {
                *id = between(0, s->n_exp - 1);
                again = 0;
                for (int32_t i = 0; i < j; i++)
                    again |= ids[t * s->top_k + i] == *id;
            }
            weights[t * s->top_k + j] = check_normal();
        }
}

static void group(struct sublayer *s) {
    size_t all = (size_t)rows_of(s), chosen = (size_t)(s->n_tok * s->top_k);
    size_t tiles = (size_t)DSV4_CUDA_TILES(s->n_tok, s->n_exp, s->top_k, s->tile_tok);
    int32_t *ids = check_aligned(4 * chosen, 4);
    float *weights = check_aligned(4 * chosen, 4);
    random_choices(s, ids, weights);
    struct dsv4_cuda_group_args *g = &s->group;
    *g = (struct dsv4_cuda_group_args){
        .group_first = check_aligned(4 * (size_t)(s->n_exp + 2), 4), .row_tok = check_aligned(4 * all, 4),
        .row_weight = check_aligned(4 * all, 4), .tok_rows = check_aligned(4 * all, 4),
        .tiles = check_aligned(tiles * sizeof *g->tiles, 4), .n_tile = check_aligned(4, 4), .ids = ids, .weights = weights,
        .n_tok = s->n_tok, .n_exp = s->n_exp, .top_k = s->top_k, .tile_tok = s->tile_tok,
        .uses = check_below(2) ? check_aligned(8 * (size_t)s->n_exp, 8) : NULL};
    for (int32_t e = 0; g->uses && e < s->n_exp; e++)
        g->uses[e] = (uint64_t)e << 40;
    check_true(dsv4_cuda_group(g, NULL) == 0, "launch");
    check_groups(g);
    for (int32_t e = 0; g->uses && e < s->n_exp; e++)
        check_true(g->uses[e] == ((uint64_t)e << 40) + (uint64_t)(g->group_first[e + 1] - g->group_first[e]),
                   "uses of %d", e);
}

static void random_inputs(struct sublayer *s) {
    size_t all = (size_t)rows_of(s), n = (size_t)(s->n_tok * s->d), mid = all * (size_t)s->width;
    s->hc = between(1, 8);
    size_t hc = (size_t)s->hc, tok = (size_t)s->n_tok;
    s->x = check_aligned(2 * n, 2);
    s->xq = check_aligned(2 * n, 2);
    s->post = check_aligned(4 * tok * hc, 4);
    s->comb = check_aligned(4 * tok * hc * hc, 4);
    for (int i = 0; i < 2; i++) {
        for (int j = 0; j < 3; j++) {
            s->mid[i][j] = check_aligned(2 * mid, 2);
            memset(s->mid[i][j], 0, 2 * mid);
        }
        s->out[i] = check_aligned(2 * all * (size_t)s->d, 2);
        memset(s->out[i], 0, 2 * all * (size_t)s->d);
        s->y[i] = check_aligned(2 * n, 2);
        s->streams[i] = check_aligned(2 * n * hc, 2);
    }
    check_fill_bf16(s->x, n, CHECK_NORMAL);
    for (int32_t t = 0; t < s->n_tok; t++)
        ref()->act_quant(s->xq + t * s->d, NULL, NULL, s->x + t * s->d, s->d);
    check_fill_bf16(s->streams[0], n * hc, CHECK_NORMAL);
    memcpy(s->streams[1], s->streams[0], 2 * n * hc);
    check_fill_f32(s->post, tok * hc, CHECK_NORMAL);
    check_fill_f32(s->comb, tok * hc * hc, CHECK_NORMAL);
}

/* In launches of their own, or with what follows in those of the experts. */
static void on_device(const struct sublayer *s) {
    const struct dsv4_cuda_group_args *g = &s->group;
    dsv4_bf16 *const *mid = s->mid[1];
    int32_t max_tile = DSV4_CUDA_TILES(s->n_tok, s->n_exp, s->top_k, s->tile_tok);
    size_t n_ticket = (size_t)(max_tile * ((s->width + 127) / 128) + (s->d + 15) / 16);
    int32_t *tickets = check_aligned(4 * n_ticket, 4);
    int whole = check_below(2) && s->cold < 0;
    memset(tickets, 0, 4 * n_ticket);
    struct dsv4_cuda_swiglu_args swiglu = {
        .out = mid[2], .g = mid[0], .u = mid[1], .weights = g->row_weight, .n_row = rows_of(s), .n = s->width,
        .first_shared = s->n_tok * s->top_k, .limit = 0.7f, .shared_limit = INFINITY, .quant = s->quant[0],
        .shared_quant = s->quant[1]};
    struct dsv4_cuda_expert_sum_args sum = {.out = s->y[1], .rows = s->out[1], .tok_rows = g->tok_rows, .n_tok = s->n_tok,
                                            .per_tok = s->top_k + 1, .n = s->d};
    struct dsv4_cuda_spread_args spread = {
        .out = s->streams[1], .y = s->y[1], .streams = s->streams[1], .post = s->post, .comb = s->comb, .n_tok = s->n_tok,
        .hc = s->hc, .d_model = s->d};
    RUN(experts, .w = {s->w[0], s->w[1]}, .out = {mid[0], mid[1]}, .x_quant = s->xq, .x_plain = s->x,
        .row_tok = g->row_tok, .tiles = g->tiles, .n_tile = g->n_tile, .max_tile = max_tile, .tile_tok = s->tile_tok,
        .rows = s->width, .cols = s->d, .n_tok = s->n_tok, .tickets = tickets, .swiglu = whole ? &swiglu : NULL);
    if (!whole)
        check_true(dsv4_cuda_swiglu(&swiglu, NULL) == 0, "launch");
    RUN(experts, .w = {s->w[2]}, .out = {s->out[1]}, .x_quant = mid[2], .x_plain = mid[2], .tiles = g->tiles,
        .n_tile = g->n_tile, .max_tile = max_tile, .tile_tok = s->tile_tok, .rows = s->d, .cols = s->width,
        .n_tok = s->n_tok, .tickets = tickets, .sum = whole ? &sum : NULL, .spread = whole ? &spread : NULL);
    if (!whole)
        check_true(dsv4_cuda_expert_sum(&sum, NULL) == 0 && dsv4_cuda_spread(&spread, NULL) == 0, "launch");
}

static void by_ref(const struct sublayer *s) {
    const struct dsv4_cuda_group_args *g = &s->group;
    dsv4_bf16 *const *mid = s->mid[0];
    int32_t d = s->d, width = s->width, hc = s->hc, per_tok = s->top_k + 1;
    for (int32_t e = 0; e <= s->n_exp; e++) {
        int32_t first = g->group_first[e], n = g->group_first[e + 1] - first, q = s->quant[e == s->n_exp];
        if (!n)
            continue;
        for (int i = 0; i < 2 && e != s->cold; i++)
            ref_linear(&s->w[i][e], mid[i] + first * width, 0, width, q ? s->xq : s->x, d, g->row_tok + first, n, 0, width);
        for (int32_t i = first; i < first + n; i++) {
            dsv4_bf16 *h = mid[2] + i * width;
            ref()->swiglu(h, mid[0] + i * width, mid[1] + i * width, width, e == s->n_exp ? INFINITY : 0.7f,
                          g->row_weight[i]);
            if (q)
                ref()->act_quant(h, NULL, NULL, h, width);
            else
                ref()->act_flush(h, h, width);
        }
        if (e != s->cold)
            ref_linear(&s->w[2][e], s->out[0] + first * d, 0, d, mid[2] + first * width, width, NULL, n, 0, d);
    }
    for (int32_t t = 0; t < s->n_tok; t++) {
        const dsv4_bf16 *rows[64];
        dsv4_bf16 *y = s->y[0] + t * d, *streams = s->streams[0] + t * hc * d;
        for (int32_t j = 0; j < per_tok; j++)
            rows[j] = s->out[0] + g->tok_rows[t * per_tok + j] * d;
        ref()->expert_sum(y, rows, per_tok, d);
        ref()->hc_post(&(struct dsv4_hc_post_args){.out = streams, .y = y, .streams = streams, .post = s->post + t * hc,
                                                   .comb = s->comb + t * hc * hc, .hc = hc, .d_model = d, .c0 = 0,
                                                   .c1 = d});
    }
}

static void experts(struct sublayer s) {
    random_experts(&s);
    group(&s);
    random_inputs(&s);
    on_device(&s);
    by_ref(&s);
    size_t rows = (size_t)rows_of(&s), n = (size_t)(s.n_tok * s.d);
    same_bf16("gate", s.mid[1][0], s.mid[0][0], rows * (size_t)s.width);
    same_bf16("up", s.mid[1][1], s.mid[0][1], rows * (size_t)s.width);
    same_bf16("swiglu", s.mid[1][2], s.mid[0][2], rows * (size_t)s.width);
    same_bf16("down", s.out[1], s.out[0], rows * (size_t)s.d);
    same_bf16("expert_sum", s.y[1], s.y[0], n);
    same_bf16("spread", s.streams[1], s.streams[0], n * (size_t)s.hc);
    check_reset();
}

void check_moe(void) {
    for (int i = 0; i < 40; i++) {
        int32_t n_exp = between(1, 300), top_k = between(1, n_exp < 9 ? n_exp : 9);
        route(between(1, 4), n_exp, top_k, i % 8);
    }
    for (int i = 0; i < 24; i++) {
        struct sublayer s = {.n_exp = between(1, 5), .tile_tok = i % 2 ? DSV4_CUDA_FEW_TILE : DSV4_CUDA_MANY_TILE};
        s.top_k = between(1, s.n_exp);
        s.n_tok = i % 4 == 1 ? between(1, 4) : between(1, 50);
        s.d = 32 * between(1, 6);
        s.width = 32 * between(1, 6);
        experts(s);
    }
}
