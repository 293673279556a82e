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

/* A whole sublayer from the router's choice on. */
static void experts(int32_t n_tok, int32_t n_exp, int32_t top_k, int32_t d, int32_t width, int32_t tile_tok) {
    const int32_t per_tok = top_k + 1, n_row = n_tok * per_tok, cold = check_below(2) ? between(0, n_exp - 1) : -1;
    const struct weight_case *routed = &weight_cases[check_below(2) ? 7 : check_below(WEIGHT_CASES)];
    const struct weight_case *other = &weight_cases[check_below(2) ? 0 : check_below(WEIGHT_CASES)];
    struct dsv4_weight *w[3];
    for (int i = 0; i < 3; i++) {
        w[i] = check_aligned((size_t)(n_exp + 1) * sizeof *w[i], 8);
        for (int32_t e = 0; e <= n_exp; e++) {
            const struct weight_case *c = e < n_exp ? routed : other;
            w[i][e] = random_weight(c, i < 2 ? width : d, i < 2 ? d : width, CHECK_NORMAL, 0, 0);
        }
    }
    size_t all = (size_t)n_row;
    int32_t *ids = check_aligned(4 * (size_t)(n_tok * top_k), 4);
    float *weights = check_aligned(4 * (size_t)(n_tok * top_k), 4);
    for (int32_t t = 0; t < n_tok; t++)
        for (int32_t j = 0; j < top_k; j++) {
            int32_t *id = &ids[t * top_k + j], again = 1;
            while (again) {
                *id = between(0, n_exp - 1);
                again = 0;
                for (int32_t i = 0; i < j; i++)
                    again |= ids[t * top_k + i] == *id;
            }
            weights[t * top_k + j] = check_normal();
        }
    struct dsv4_cuda_group_args g = {
        .group_first = check_aligned(4 * (size_t)(n_exp + 2), 4), .row_tok = check_aligned(4 * all, 4),
        .row_weight = check_aligned(4 * all, 4), .tok_rows = check_aligned(4 * all, 4),
        .tiles = check_aligned((size_t)DSV4_CUDA_TILES(n_tok, n_exp, top_k, tile_tok) * sizeof *g.tiles, 4),
        .n_tile = check_aligned(4, 4), .ids = ids, .weights = weights, .n_tok = n_tok, .n_exp = n_exp, .top_k = top_k,
        .tile_tok = tile_tok, .uses = check_below(2) ? check_aligned(8 * (size_t)n_exp, 8) : NULL};
    for (int32_t e = 0; g.uses && e < n_exp; e++)
        g.uses[e] = (uint64_t)e << 40;
    check_true(dsv4_cuda_group(&g, NULL) == 0, "launch");
    check_groups(&g);
    for (int32_t e = 0; g.uses && e < n_exp; e++)
        check_true(g.uses[e] == ((uint64_t)e << 40) + (uint64_t)(g.group_first[e + 1] - g.group_first[e]), "uses of %d", e);

    size_t size = all * (size_t)width;
    dsv4_bf16 *x = check_aligned(2 * (size_t)(n_tok * d), 2), *xq = check_aligned(2 * (size_t)(n_tok * d), 2);
    dsv4_bf16 *mid[2][3], *out[2], *y[2];
    for (int i = 0; i < 2; i++) {
        for (int j = 0; j < 3; j++) {
            mid[i][j] = check_aligned(2 * size, 2);
            memset(mid[i][j], 0, 2 * size);
        }
        out[i] = check_aligned(2 * all * (size_t)d, 2);
        memset(out[i], 0, 2 * all * (size_t)d);
        y[i] = check_aligned(2 * (size_t)(n_tok * d), 2);
    }
    check_fill_bf16(x, (size_t)(n_tok * d), CHECK_NORMAL);
    for (int32_t t = 0; t < n_tok; t++)
        ref()->act_quant(xq + t * d, NULL, NULL, x + t * d, d);
    int quant[2] = {routed->rule != DSV4_SCALE_NONE, other->rule != DSV4_SCALE_NONE};
    for (int i = 0; i < 3 && cold >= 0; i++)
        w[i][cold].data = NULL;
    int32_t max_tile = DSV4_CUDA_TILES(n_tok, n_exp, top_k, tile_tok);
    size_t n_ticket = (size_t)(max_tile * ((width + 127) / 128) + (d + 15) / 16);
    int32_t hc = between(1, 8), *tickets = check_aligned(4 * n_ticket, 4), fused = (int32_t)check_below(2);
    dsv4_bf16 *streams[2] = {check_aligned(2 * (size_t)(n_tok * hc * d), 2), check_aligned(2 * (size_t)(n_tok * hc * d), 2)};
    float *post = check_aligned(4 * (size_t)(n_tok * hc), 4), *comb = check_aligned(4 * (size_t)(n_tok * hc * hc), 4);
    memset(tickets, 0, 4 * n_ticket);
    check_fill_bf16(streams[0], (size_t)(n_tok * hc * d), CHECK_NORMAL);
    check_fill_f32(post, (size_t)(n_tok * hc), CHECK_NORMAL);
    check_fill_f32(comb, (size_t)(n_tok * hc * hc), CHECK_NORMAL);
    memcpy(streams[1], streams[0], 2 * (size_t)(n_tok * hc * d));
    struct dsv4_cuda_swiglu_args swiglu = {
        .out = mid[1][2], .g = mid[1][0], .u = mid[1][1], .weights = g.row_weight, .n_row = n_row, .n = width,
        .first_shared = n_tok * top_k, .limit = 0.7f, .shared_limit = INFINITY, .quant = quant[0], .shared_quant = quant[1]};
    struct dsv4_cuda_expert_sum_args sum = {
        .out = y[1], .rows = out[1], .tok_rows = g.tok_rows, .n_tok = n_tok, .per_tok = per_tok, .n = d};
    struct dsv4_cuda_spread_args spread = {
        .out = streams[1], .y = y[1], .streams = streams[1], .post = post, .comb = comb, .n_tok = n_tok, .hc = hc,
        .d_model = d};
    int whole = fused && cold < 0;
    RUN(experts, .w = {w[0], w[1]}, .out = {mid[1][0], mid[1][1]}, .x_quant = xq, .x_plain = x, .row_tok = g.row_tok,
        .tiles = g.tiles, .n_tile = g.n_tile, .max_tile = max_tile, .tile_tok = tile_tok, .rows = width, .cols = d,
        .n_tok = n_tok, .tickets = tickets, .swiglu = whole ? &swiglu : NULL);
    if (!whole)
        check_true(dsv4_cuda_swiglu(&swiglu, NULL) == 0, "launch");
    RUN(experts, .w = {w[2]}, .out = {out[1]}, .x_quant = mid[1][2], .x_plain = mid[1][2], .tiles = g.tiles,
        .n_tile = g.n_tile, .max_tile = max_tile, .tile_tok = tile_tok, .rows = d, .cols = width, .n_tok = n_tok,
        .tickets = tickets, .sum = whole ? &sum : NULL, .spread = whole ? &spread : NULL);
    if (!whole)
        check_true(dsv4_cuda_expert_sum(&sum, NULL) == 0 && dsv4_cuda_spread(&spread, NULL) == 0, "launch");

    for (int32_t e = 0; e <= n_exp; e++) {
        int32_t first = g.group_first[e], n = g.group_first[e + 1] - first, q = quant[e == n_exp];
        if (!n)
            continue;
        for (int i = 0; i < 2 && e != cold; i++)
            ref_linear(&w[i][e], mid[0][i] + first * width, 0, width, q ? xq : x, d, g.row_tok + first, n, 0, width);
        for (int32_t i = first; i < first + n; i++) {
            dsv4_bf16 *h = mid[0][2] + i * width;
            ref()->swiglu(h, mid[0][0] + i * width, mid[0][1] + i * width, width, e == n_exp ? INFINITY : 0.7f,
                          g.row_weight[i]);
            if (q)
                ref()->act_quant(h, NULL, NULL, h, width);
            else
                ref()->act_flush(h, h, width);
        }
        if (e != cold)
            ref_linear(&w[2][e], out[0] + first * d, 0, d, mid[0][2] + first * width, width, NULL, n, 0, d);
    }
    for (int32_t t = 0; t < n_tok; t++) {
        const dsv4_bf16 *rows[64];
        for (int32_t j = 0; j < per_tok; j++)
            rows[j] = out[0] + g.tok_rows[t * per_tok + j] * d;
        ref()->expert_sum(y[0] + t * d, rows, per_tok, d);
        ref()->hc_post(&(struct dsv4_hc_post_args){
            .out = streams[0] + t * hc * d, .y = y[0] + t * d, .streams = streams[0] + t * hc * d, .post = post + t * hc,
            .comb = comb + t * hc * hc, .hc = hc, .d_model = d, .c0 = 0, .c1 = d});
    }
    same_bf16("gate", mid[1][0], mid[0][0], size);
    same_bf16("up", mid[1][1], mid[0][1], size);
    same_bf16("swiglu", mid[1][2], mid[0][2], size);
    same_bf16("down", out[1], out[0], all * (size_t)d);
    same_bf16("expert_sum", y[1], y[0], (size_t)(n_tok * d));
    same_bf16("spread", streams[1], streams[0], (size_t)(n_tok * hc * d));
    check_reset();
}

void check_moe(void) {
    for (int i = 0; i < 40; i++) {
        int32_t n_exp = between(1, 300), top_k = between(1, n_exp < 9 ? n_exp : 9);
        route(between(1, 4), n_exp, top_k, i % 8);
    }
    for (int i = 0; i < 24; i++) {
        int32_t n_exp = between(1, 5), top_k = between(1, n_exp), tile = i % 2 ? DSV4_CUDA_FEW_TILE : DSV4_CUDA_MANY_TILE;
        int32_t n_tok = i % 4 == 1 ? between(1, 4) : between(1, 50);
        experts(n_tok, n_exp, top_k, 32 * between(1, 6), 32 * between(1, 6), tile);
    }
}
