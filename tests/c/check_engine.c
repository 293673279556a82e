/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The engine without Python: a random model of three layers (SWA with hash routing, CSA, HCA) in a temporary file, and the
 * promises of dsv4.h: the same bits for any cut into chunks, threads and neighbours; a cancelled or refused step leaves
 * no trace; edits keep all that; bad tensors are refused.  Small enough for sanitizers and emulated processors.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "check.h"
#include "dsv4.h"

void check_engine(void);

enum { VOCAB = 61, MAX_TENSORS = 256, PROMPT = 45 };

static const int32_t RATIOS[] = {0, 4, 8};

static const struct dsv4_config CONFIG = {
    .vocab_size = VOCAB, .hidden_size = 96, .num_hidden_layers = 3, .num_attention_heads = 2, .head_dim = 96,
    .qk_rope_head_dim = 32, .q_lora_rank = 64, .o_groups = 2, .o_lora_rank = 32, .moe_intermediate_size = 160,
    .n_routed_experts = 4, .num_experts_per_tok = 2, .num_hash_layers = 1, .sliding_window = 8, .index_n_heads = 3,
    .index_head_dim = 32, .index_topk = 3, .hc_mult = 2, .hc_sinkhorn_iters = 3, .max_position_embeddings = 200,
    .rope_theta = 1e4, .compress_rope_theta = 4e4, .yarn_factor = 4, .yarn_beta_fast = 32, .yarn_beta_slow = 1,
    .yarn_original_positions = 64, .rms_norm_eps = 1e-6f, .hc_eps = 1e-6f, .routed_scaling_factor = 1.5f,
    .swiglu_limit = 10.0f, .compress_ratios = RATIOS,
};

struct file {
    uint8_t *bytes;
    uint64_t size, capacity;
    struct dsv4_tensor_desc tensors[MAX_TENSORS];
    char names[MAX_TENSORS][96];
    int32_t n;
};

static uint8_t *put(struct file *f, const char *name, int32_t dtype, int64_t rows, int64_t cols, uint64_t nbytes) {
    check_true(f->n < MAX_TENSORS, "room for tensors");
    while (f->size + nbytes > f->capacity) {
        f->capacity = f->capacity ? 2 * f->capacity : 1 << 20;
        f->bytes = realloc(f->bytes, f->capacity);
        check_true(f->bytes != NULL, "memory");
    }
    snprintf(f->names[f->n], sizeof f->names[0], "%s", name);
    f->tensors[f->n] = (struct dsv4_tensor_desc){
        .name = f->names[f->n], .dtype = dtype, .rank = cols ? 2 : 1, .shape = {rows, cols}, .offset = f->size,
        .nbytes = nbytes,
    };
    f->n++;
    f->size += nbytes;
    return f->bytes + f->size - nbytes;
}

static void put_bf16(struct file *f, const char *name, int64_t rows, int64_t cols, float scale, float shift) {
    int64_t n = rows * (cols ? cols : 1);
    uint8_t *to = put(f, name, DSV4_BF16, rows, cols, (uint64_t)n * 2);
    for (int64_t i = 0; i < n; i++) {
        dsv4_bf16 h = dsv4_f32_to_bf16(check_normal() * scale + shift);
        memcpy(to + 2 * i, &h, 2);
    }
}

static void put_f32(struct file *f, const char *name, int64_t rows, int64_t cols, float scale) {
    int64_t n = rows * (cols ? cols : 1);
    uint8_t *to = put(f, name, DSV4_F32, rows, cols, (uint64_t)n * 4);
    for (int64_t i = 0; i < n; i++) {
        float v = check_normal() * scale;
        memcpy(to + 4 * i, &v, 4);
    }
}

static void put_fp8(struct file *f, const char *linear, int64_t rows, int64_t cols) {
    char name[128];
    snprintf(name, sizeof name, "%s.weight", linear);
    uint8_t *to = put(f, name, DSV4_F8_E4M3, rows, cols, (uint64_t)(rows * cols));
    for (int64_t i = 0; i < rows * cols; i++)
        to[i] = dsv4_e4m3_from_f32(check_normal() * 60.0f);
    snprintf(name, sizeof name, "%s.scale", linear);
    int64_t blocks_r = (rows + 127) / 128, blocks_c = (cols + 127) / 128;
    memset(put(f, name, DSV4_F8_E8M0, blocks_r, blocks_c, (uint64_t)(blocks_r * blocks_c)), 118,
           (size_t)(blocks_r * blocks_c));
}

static void put_fp4(struct file *f, const char *linear, int64_t rows, int64_t cols) {
    char name[128];
    snprintf(name, sizeof name, "%s.weight", linear);
    uint8_t *to = put(f, name, DSV4_FP4, rows, cols, (uint64_t)(rows * cols / 2));
    for (int64_t i = 0; i < rows * cols / 2; i++)
        to[i] = (uint8_t)check_below(256);
    snprintf(name, sizeof name, "%s.scale", linear);
    uint8_t *scale = put(f, name, DSV4_F8_E8M0, rows, cols / 32, (uint64_t)(rows * cols / 32));
    for (int64_t i = 0; i < rows * cols / 32; i++)
        scale[i] = (uint8_t)(121 + check_below(4));
}

static void put_compressor(struct file *f, const char *prefix, int32_t ratio, int32_t dim) {
    char name[64];
    int64_t width = dim * (ratio == 4 ? 2 : 1);
#define NAME(suffix) (snprintf(name, sizeof name, "%s%s", prefix, suffix), name)
    put_f32(f, NAME("ape"), ratio, width, 0.5f);
    put_bf16(f, NAME("norm.weight"), dim, 0, 0.2f, 1.0f);
    put_bf16(f, NAME("wkv.weight"), width, CONFIG.hidden_size, 0.1f, 0.0f);
    put_bf16(f, NAME("wgate.weight"), width, CONFIG.hidden_size, 0.1f, 0.0f);
}

static void put_layer(struct file *f, int layer) {
    const struct dsv4_config *c = &CONFIG;
    char prefix[32], name[64];
    int32_t d = c->hidden_size, hc = c->hc_mult, ratio = RATIOS[layer], heads = c->num_attention_heads * c->head_dim;
    snprintf(prefix, sizeof prefix, "layers.%d.", layer);
    for (int site = 0; site < 2; site++) {
        put_f32(f, NAME(site ? "hc_ffn_fn" : "hc_attn_fn"), (2 + hc) * hc, hc * d, 0.1f);
        put_f32(f, NAME(site ? "hc_ffn_base" : "hc_attn_base"), (2 + hc) * hc, 0, 1.0f);
        put_f32(f, NAME(site ? "hc_ffn_scale" : "hc_attn_scale"), 3, 0, 0.5f);
        put_bf16(f, NAME(site ? "ffn_norm.weight" : "attn_norm.weight"), d, 0, 0.2f, 1.0f);
    }
    put_f32(f, NAME("attn.attn_sink"), c->num_attention_heads, 0, 1.0f);
    put_bf16(f, NAME("attn.q_norm.weight"), c->q_lora_rank, 0, 0.2f, 1.0f);
    put_bf16(f, NAME("attn.kv_norm.weight"), c->head_dim, 0, 0.2f, 1.0f);
    put_fp8(f, NAME("attn.wq_a"), c->q_lora_rank, d);
    put_fp8(f, NAME("attn.wq_b"), heads, c->q_lora_rank);
    put_fp8(f, NAME("attn.wkv"), c->head_dim, d);
    put_fp8(f, NAME("attn.wo_a"), c->o_groups * c->o_lora_rank, heads / c->o_groups);
    put_fp8(f, NAME("attn.wo_b"), d, c->o_groups * c->o_lora_rank);
    if (ratio)
        put_compressor(f, NAME("attn.compressor."), ratio, c->head_dim);
    if (ratio == 4) {
        put_fp8(f, NAME("attn.indexer.wq_b"), c->index_n_heads * c->index_head_dim, c->q_lora_rank);
        put_bf16(f, NAME("attn.indexer.weights_proj.weight"), c->index_n_heads, d, 0.1f, 0.0f);
        put_compressor(f, NAME("attn.indexer.compressor."), ratio, c->index_head_dim);
    }
    put_bf16(f, NAME("ffn.gate.weight"), c->n_routed_experts, d, 0.1f, 0.0f);
    if (layer < c->num_hash_layers) {
        int64_t *ids = (int64_t *)(void *)put(f, NAME("ffn.gate.tid2eid"), DSV4_I64, VOCAB, 2, VOCAB * 2 * 8);
        for (int64_t i = 0; i < VOCAB * 2; i++) {
            int64_t id = (i + i / 2) % 4;
            memcpy(ids + i, &id, 8);
        }
    } else {
        put_f32(f, NAME("ffn.gate.bias"), c->n_routed_experts, 0, 0.3f);
    }
    for (int e = 0; e <= c->n_routed_experts; e++) {
        char expert[32], full[96];
        snprintf(expert, sizeof expert, e < c->n_routed_experts ? "ffn.experts.%d" : "ffn.shared_experts", e);
        void (*linear)(struct file *, const char *, int64_t, int64_t) = e < c->n_routed_experts ? put_fp4 : put_fp8;
        snprintf(full, sizeof full, "%s%s.w1", prefix, expert);
        linear(f, full, c->moe_intermediate_size, d);
        snprintf(full, sizeof full, "%s%s.w3", prefix, expert);
        linear(f, full, c->moe_intermediate_size, d);
        snprintf(full, sizeof full, "%s%s.w2", prefix, expert);
        linear(f, full, d, c->moe_intermediate_size);
    }
#undef NAME
}

static struct file *make_file(void) {
    struct file *f = calloc(1, sizeof *f);
    check_true(f != NULL, "memory");
    put_bf16(f, "embed.weight", VOCAB, CONFIG.hidden_size, 1.0f, 0.0f);
    put_bf16(f, "head.weight", VOCAB, CONFIG.hidden_size, 0.2f, 0.0f);
    put_bf16(f, "norm.weight", CONFIG.hidden_size, 0, 0.2f, 1.0f);
    put_f32(f, "hc_head_fn", CONFIG.hc_mult, CONFIG.hc_mult * CONFIG.hidden_size, 0.1f);
    put_f32(f, "hc_head_base", CONFIG.hc_mult, 0, 1.0f);
    put_f32(f, "hc_head_scale", 1, 0, 0.5f);
    for (int i = 0; i < CONFIG.num_hidden_layers; i++)
        put_layer(f, i);
    return f;
}

static int temporary(const struct file *f) {
    char path[] = "/tmp/dsv4-check-XXXXXX";
    int fd = mkstemp(path);
    check_true(fd >= 0, "temporary file");
    unlink(path);
    check_true(write(fd, f->bytes, f->size) == (ssize_t)f->size, "writing");
    return fd;
}

static dsv4_status load_with(dsv4_model **m, const struct file *f, const struct dsv4_options *options, int *keep,
                             dsv4_error *err) {
    int fd = temporary(f);
    struct dsv4_shard_desc shard = {"shard", fd, f->size};
    dsv4_status status = dsv4_model_create(m, &CONFIG, &shard, 1, f->tensors, f->n, options, err);
    if (keep)
        *keep = fd;
    else
        close(fd);
    return status;
}

static dsv4_status load(dsv4_model **m, const struct file *f, int threads, int chunk, int use_mmap, dsv4_error *err) {
    struct dsv4_options options = {.n_thread = threads, .chunk_tok = chunk, .use_mmap = use_mmap};
    return load_with(m, f, &options, NULL, err);
}

/* The streams an edit asks about, halved. */
static void answer(dsv4_run *run) {
    struct dsv4_call call;
    dsv4_run_call(run, &call);
    size_t n = (size_t)call.n * (size_t)call.hc_mult * (size_t)call.hidden_size;
    float *streams = malloc(n * sizeof *streams);
    int32_t *positions = malloc((size_t)call.n * sizeof *positions);
    check_true(call.function == &CONFIG && call.layer == 1, "the operation that asks");
    dsv4_run_read(run, streams, positions);
    check_true(positions[0] >= 4 && positions[call.n - 1] < 30, "its positions");
    for (size_t i = 0; i < n; i++)
        streams[i] *= 0.5f;
    dsv4_run_resume(run, streams);
    free(streams);
    free(positions);
}

static dsv4_status step(dsv4_model *m, struct dsv4_segment *segments, int n, dsv4_error *err) {
    dsv4_run *run;
    int state;
    DSV4_TRY(dsv4_step_start(&run, m, segments, n, NULL, err));
    while ((state = dsv4_run_wait(run, 50)))
        if (state == 2)
            answer(run);
    return dsv4_run_finish(run, err);
}

static dsv4_session *session(dsv4_model *m) {
    dsv4_session *s;
    check_true(dsv4_session_create(&s, m, 0, NULL) == DSV4_OK, "session");
    return s;
}

/* All logits of the prompt, fed in pieces of `chunk` tokens, with an edit or NULL. */
static void run_edited(dsv4_model *m, dsv4_edit *edit, const int32_t *ids, int chunk, float *logits) {
    dsv4_session *s = session(m);
    check_true(dsv4_session_edit(s, edit, NULL) == DSV4_OK, "edit");
    for (int at = 0; at < PROMPT; at += chunk) {
        int n = PROMPT - at < chunk ? PROMPT - at : chunk;
        struct dsv4_segment seg = {.session = s, .ids = ids + at, .logits = logits + (size_t)at * VOCAB, .n = n, .want = DSV4_LOGITS_ALL};
        dsv4_error err;
        dsv4_status status = step(m, &seg, 1, &err);
        check_true(status == DSV4_OK, "step: %s", status == DSV4_OK ? "" : err.message);
    }
    check_true(dsv4_session_position(s) == PROMPT, "position");
    dsv4_session_destroy(s);
}

static void run_prompt(dsv4_model *m, const int32_t *ids, int chunk, float *logits) {
    run_edited(m, NULL, ids, chunk, logits);
}

static void same(const char *what, const float *got, const float *want, size_t n) {
    for (size_t i = 0; i < n; i++)
        check_true(dsv4_f32_bits(got[i]) == dsv4_f32_bits(want[i]), "%s: logit %zu: got %.9g, wanted %.9g", what, i,
                   (double)got[i], (double)want[i]);
}

static void check_neighbours(dsv4_model *m, const int32_t *ids, const float *want) {
    static const int AT[] = {1, 7, 8, 30, PROMPT - 1};
    float got[5][VOCAB];
    struct dsv4_segment segments[5];
    for (int i = 0; i < 5; i++) {
        dsv4_session *s = session(m);
        struct dsv4_segment warm = {.session = s, .ids = ids, .n = AT[i], .want = DSV4_LOGITS_NONE};
        check_true(step(m, &warm, 1, NULL) == DSV4_OK, "prompt");
        segments[i] = (struct dsv4_segment){.session = s, .ids = ids + AT[i], .logits = got[i], .n = 1, .want = DSV4_LOGITS_LAST};
    }
    check_true(step(m, segments, 5, NULL) == DSV4_OK, "batch");
    for (int i = 0; i < 5; i++) {
        same("batch", got[i], want + (size_t)AT[i] * VOCAB, VOCAB);
        dsv4_session_destroy(segments[i].session);
    }
}

/* Cancelled and refused steps leave no trace. */
static void check_atomic(dsv4_model *m, const int32_t *ids, const float *want) {
    dsv4_session *s = session(m);
    float got[VOCAB];
    struct dsv4_segment first = {.session = s, .ids = ids, .n = 20, .want = DSV4_LOGITS_NONE};
    check_true(step(m, &first, 1, NULL) == DSV4_OK, "prompt");
    int cancelled = 0;
    for (int i = 0; i < 30; i++) {
        struct dsv4_segment seg = {.session = s, .ids = ids + 3, .n = 40, .want = DSV4_LOGITS_NONE};
        dsv4_run *run;
        dsv4_error err;
        check_true(dsv4_step_start(&run, m, &seg, 1, NULL, &err) == DSV4_OK, "start");
        if (i % 3)
            dsv4_run_wait(run, 1);
        dsv4_run_cancel(run);
        dsv4_status status = dsv4_run_finish(run, &err);
        check_true(status == DSV4_E_CANCELLED, "a cancelled step says so");
        cancelled++;
        check_true(dsv4_session_position(s) == 20, "the position stays");
    }
    int32_t bad[] = {1, VOCAB};
    struct dsv4_segment wrong = {.session = s, .ids = bad, .n = 2, .want = DSV4_LOGITS_NONE};
    struct dsv4_segment twice[2] = {wrong, wrong};
    wrong.n = 0;
    check_true(step(m, &wrong, 1, NULL) == DSV4_E_ARGUMENT, "an empty segment is refused");
    wrong.n = 2;
    check_true(step(m, &wrong, 1, NULL) == DSV4_E_ARGUMENT, "an id out of range is refused");
    bad[1] = 2;
    check_true(step(m, twice, 2, NULL) == DSV4_E_ARGUMENT, "a session twice is refused");
    for (int at = 20; at < PROMPT; at++) {
        struct dsv4_segment seg = {.session = s, .ids = ids + at, .logits = got, .n = 1, .want = DSV4_LOGITS_LAST};
        check_true(step(m, &seg, 1, NULL) == DSV4_OK, "decode");
        same("after cancelled steps", got, want + (size_t)at * VOCAB, VOCAB);
    }
    check_true(cancelled == 30, "steps were cancelled");
    dsv4_session_destroy(s);
}

/* One operation of every kind, at the same positions but for the rows of its own that SET has. */
static dsv4_edit *make_edit(dsv4_model *m) {
    static const int32_t some[] = {4, 9, 12, 30}, three[] = {2, 3, 20, 22}, one[] = {1}, both[] = {3};
    static const int32_t experts[] = {3, 1}, entries[] = {1, 3}, forced[] = {5, 6};
    static float rows[3][2][96], limits[2][96], factors[] = {0.5f, 3.0f};
    for (int i = 0; i < 96; i++) {
        for (int j = 0; j < 6; j++)
            rows[j / 2][j % 2][i] = (float)((i * 7 + j * 5) % 13 - 6) / 4.0f;
        limits[0][i] = -0.5f;
        limits[1][i] = 0.75f;
    }
#define OP(k, at, l, id, n) .kind = (k), .site = (at), .layer = (l), .n_row = 1, .ids = (id), .n_id = (n)
    const struct dsv4_edit_op ops[] = {
        {OP(DSV4_EDIT_ADD, DSV4_AT_STREAMS, -1, one, 1), .positions = some, .n_range = 2, .values = rows[0][0], .n_value = 96},
        {OP(DSV4_EDIT_ADD, DSV4_AT_FFN_IN, 1, one, 1), .values = rows[1][0], .n_value = 96},
        {.kind = DSV4_EDIT_SET, .layer = 0, .n_row = 3, .ids = both, .n_id = 1, .positions = three, .n_range = 2,
         .values = rows[0][0], .n_value = 576},
        {OP(DSV4_EDIT_CLAMP, DSV4_AT_ATTENTION_OUT, 2, one, 1), .values = limits[0], .n_value = 192},
        {OP(DSV4_EDIT_CALL, 0, 1, NULL, 0), .positions = some, .n_range = 2, .function = (void *)(uintptr_t)&CONFIG},
        {OP(DSV4_EDIT_EXPERTS_OFF, 0, 0, experts, 2)},
        {OP(DSV4_EDIT_EXPERTS_OFF, 0, 2, experts, 1), .positions = some, .n_range = 2},
        {OP(DSV4_EDIT_EXPERTS_WEIGH, 0, 2, experts, 2), .values = factors, .n_value = 2},
        {OP(DSV4_EDIT_EXPERTS_FORCE, 0, 1, experts, 2), .positions = some, .n_range = 2},
        {OP(DSV4_EDIT_HEADS_OFF, 0, 0, one, 1), .positions = some, .n_range = 2},
        {OP(DSV4_EDIT_SINKS_OFF, 0, 1, one, 1)},
        {OP(DSV4_EDIT_ENTRIES_OFF, 0, 1, entries, 2)},
        {OP(DSV4_EDIT_ENTRIES_OFF, 0, 2, entries, 2), .positions = some, .n_range = 2},
        {OP(DSV4_EDIT_ENTRIES_ON, 0, 1, forced, 2)},
    };
    enum { N = sizeof ops / sizeof ops[0] };
    struct dsv4_edit_op bad[N];
    dsv4_edit *edit = NULL;
    for (int i = 0; i < N; i++) {
        memcpy(bad, ops, sizeof ops);
        bad[i].layer = CONFIG.num_hidden_layers;
        check_true(dsv4_edit_create(&edit, m, bad, N, NULL) == DSV4_E_ARGUMENT && !edit, "a layer out of range");
        bad[i].layer = ops[i].layer;
        bad[i].n_row = 2;
        check_true(dsv4_edit_create(&edit, m, bad, N, NULL) == DSV4_E_ARGUMENT && !edit, "rows that are not there");
    }
    check_true(dsv4_edit_create(&edit, m, ops, N, NULL) == DSV4_OK, "edit");
    return edit;
}

/* The same bits for any cut and any number of threads; sessions keep what they use. */
static void check_edits(dsv4_model *m, const int32_t *ids, const float *plain, float *want, float *got, int first) {
    dsv4_edit *edit = make_edit(m);
    if (first)
        run_edited(m, edit, ids, PROMPT, want);
    for (int t = 0; t < PROMPT; t++)
        check_true(memcmp(want + (size_t)t * VOCAB, plain + (size_t)t * VOCAB, VOCAB * sizeof *want) != 0,
                   "an edit changes token %d", t);
    run_edited(m, edit, ids, first ? 1 : PROMPT, got);
    same("edited, all or one", got, want, (size_t)PROMPT * VOCAB);
    run_edited(m, edit, ids, 7, got);
    same("edited, pieces of 7", got, want, (size_t)PROMPT * VOCAB);
    dsv4_session *s = session(m), *fork;
    check_true(dsv4_session_edit(s, edit, NULL) == DSV4_OK, "edit");
    dsv4_edit_release(edit);
    struct dsv4_segment seg = {.session = s, .ids = ids, .logits = got, .n = 11, .want = DSV4_LOGITS_ALL};
    check_true(step(m, &seg, 1, NULL) == DSV4_OK, "edited step");
    check_true(dsv4_session_fork(&fork, s, DSV4_NOW, 0, NULL) == DSV4_OK, "fork");
    dsv4_session_destroy(s);
    seg = (struct dsv4_segment){.session = fork, .ids = ids + 11, .logits = got + (size_t)11 * VOCAB, .n = PROMPT - 11, .want = DSV4_LOGITS_ALL};
    check_true(step(m, &seg, 1, NULL) == DSV4_OK, "edited fork");
    same("edited fork", got, want, (size_t)PROMPT * VOCAB);
    dsv4_session_destroy(fork);
}

static struct dsv4_tensor_desc *tensor(struct file *f, const char *name) {
    for (int32_t i = 0; i < f->n; i++)
        if (strcmp(f->names[i], name) == 0)
            return &f->tensors[i];
    check_true(0, "tensor %s", name);
    return NULL;
}

static void refuse(struct file *f, const char *what) {
    dsv4_model *m;
    dsv4_error err = {0};
    check_true(load(&m, f, 2, 0, 1, &err) == DSV4_E_FORMAT, "%s is refused", what);
    check_true(err.message[0] != 0, "%s: a message", what);
}

static void check_refusals(struct file *f) {
    struct dsv4_tensor_desc *t = tensor(f, "layers.1.attn.wkv.weight"), kept = *t;
    t->shape[0]--;
    refuse(f, "a wrong shape");
    *t = kept;
    t->offset = f->size;
    refuse(f, "an extent outside the file");
    *t = kept;
    t->dtype = DSV4_F32;
    refuse(f, "a dtype that does not fit the bytes");
    *t = kept;
    uint8_t *scale = f->bytes + tensor(f, "layers.2.ffn.experts.3.w2.scale")->offset + 5, byte = *scale;
    *scale = 255;
    refuse(f, "a NaN scale");
    *scale = byte;
    uint8_t *norm = f->bytes + tensor(f, "layers.0.attn_norm.weight")->offset, high = norm[1], low = norm[0];
    norm[0] = 0x80;
    norm[1] = 0x7f;
    refuse(f, "an infinite norm");
    norm[0] = low;
    norm[1] = high;
    uint8_t *id = f->bytes + tensor(f, "layers.0.ffn.gate.tid2eid")->offset;
    id[0] += 4;
    refuse(f, "an expert id out of range");
    id[0] -= 4;
}

/* NaN in a weight: the step fails, names the layer, and the session is as it was. */
static void check_nonfinite(struct file *f, const int32_t *ids) {
    struct dsv4_tensor_desc *t = tensor(f, "layers.1.attn.wkv.weight");
    uint8_t *code = f->bytes + t->offset + 100, kept = *code;
    dsv4_model *m;
    dsv4_error err;
    float got[VOCAB];
    *code = 0x7f;
    check_true(load(&m, f, 2, 0, 0, &err) == DSV4_OK, "NaN codes load");
    *code = kept;
    dsv4_session *s = session(m);
    struct dsv4_segment seg = {.session = s, .ids = ids, .logits = got, .n = 9, .want = DSV4_LOGITS_LAST};
    dsv4_status status = step(m, &seg, 1, &err);
    check_true(status == DSV4_E_NONFINITE && err.layer == 1, "NaN is found in layer 1, got %d: %s", err.layer,
               err.message);
    check_true(dsv4_session_position(s) == 0, "nothing was appended");
    dsv4_session_destroy(s);
    dsv4_model_destroy(m);
}

/* Routed experts from disk, room for some, for all, for too few: the same bits; the counts add up. */
static void check_from_disk(const struct file *f, const int32_t *ids, const float *want, float *got) {
    struct dsv4_options options = {.n_thread = 2, .chunk_tok = 13, .use_mmap = 1, .expert_bytes = 1};
    struct dsv4_expert_counts n;
    dsv4_model *m;
    dsv4_error err;
    check_true(load_with(&m, f, &options, NULL, &err) == DSV4_E_MEMORY, "room for no expert is refused");
    static const int SLOTS[] = {12, 2, 3, 7};
    for (int i = 0; i < 4; i++) {
        options.expert_bytes = i ? n.slot_bytes * (uint64_t)SLOTS[i] + n.slot_bytes / 2 : 1 << 20;
        check_true(load_with(&m, f, &options, NULL, &err) == DSV4_OK, "load: %s", err.message);
        dsv4_model_experts(m, &n);
        check_true(n.slots == SLOTS[i], "got %d slots, wanted %d", n.slots, SLOTS[i]);
        run_prompt(m, ids, 1, got);
        same("experts from disk, token by token", got, want, (size_t)PROMPT * VOCAB);
        dsv4_model_experts(m, &n);
        check_true(n.kept + n.read == (uint64_t)PROMPT * 3 * 2 && !n.mapped && n.read >= 4, "kept %llu, read %llu, mapped "
                   "%llu", (unsigned long long)n.kept, (unsigned long long)n.read, (unsigned long long)n.mapped);
        check_true(n.bytes >= n.read * 24480 && n.bytes <= n.read * n.slot_bytes, "%llu bytes for %llu experts",
                   (unsigned long long)n.bytes, (unsigned long long)n.read);
        check_true(n.slots < 12 || n.read <= 12, "every expert is read once when all fit");
        run_prompt(m, ids, PROMPT, got);
        same("experts from disk, whole prompt", got, want, (size_t)PROMPT * VOCAB);
        check_neighbours(m, ids, want);
        check_atomic(m, ids, want);
        dsv4_model_destroy(m);
    }
}

/* The file shrinks under a loaded model: the step fails, names an expert, and leaves its session as it was. */
static void check_shrunk(const struct file *f, const int32_t *ids) {
    struct dsv4_options options = {.n_thread = 2, .use_mmap = 1, .expert_bytes = 1 << 20};
    dsv4_model *m;
    dsv4_error err;
    int fd;
    check_true(load_with(&m, f, &options, &fd, &err) == DSV4_OK, "load");
    uint64_t first = f->size;
    for (int32_t i = 0; i < f->n; i++)
        if (strstr(f->names[i], "layers.2.ffn.experts.") && f->tensors[i].offset < first)
            first = f->tensors[i].offset;
    dsv4_session *s = session(m);
    struct dsv4_segment seg = {.session = s, .ids = ids, .n = 1, .want = DSV4_LOGITS_NONE};
    uint8_t *kept = malloc(f->size - first);
    check_true(kept && pread(fd, kept, f->size - first, (off_t)first) == (ssize_t)(f->size - first), "reading");
    check_true(ftruncate(fd, (off_t)first) == 0, "truncate");
    dsv4_status status = step(m, &seg, 1, &err);
    check_true(status == DSV4_E_IO && strstr(err.message, "layers.2.ffn.experts."), "a short file fails the step: %s",
               status == DSV4_OK ? "it did not" : err.message);
    check_true(dsv4_session_position(s) == 0, "nothing was appended");
    check_true(pwrite(fd, kept, f->size - first, (off_t)first) == (ssize_t)(f->size - first), "writing");
    check_true(step(m, &seg, 1, &err) == DSV4_OK, "and works when it is whole again");
    free(kept);
    close(fd);
    dsv4_session_destroy(s);
    dsv4_model_destroy(m);
}

/*
 * A machine that says every other processor is on another memory node: weights are copied and cut by node (on a machine
 * with one processor they are not), and the bits are the same.
 */
static void check_nodes(const struct file *f, const int32_t *ids, const float *want, float *got) {
    char folder[] = "/tmp/dsv4-check-XXXXXX", command[64];
    check_true(mkdtemp(folder) != NULL, "temporary folder");
    check_write(folder, "sys/devices/system/node/online", "0-2\n");
    check_write(folder, "sys/devices/system/node/node0/cpulist", "0,3,6,9,12,15-1000\n");
    check_write(folder, "sys/devices/system/node/node1/cpulist", "1,4,7,10,13\n");
    check_write(folder, "sys/devices/system/node/node2/cpulist", "2,5,8,11,14\n");
    for (int threads = 1; threads <= 5; threads++) {
        struct dsv4_options options = {.n_thread = threads, .use_mmap = threads != 3, .copy_to_nodes = threads != 4,
                                       .root = folder};
        dsv4_model *m;
        dsv4_error err;
        check_true(load_with(&m, f, &options, NULL, &err) == DSV4_OK, "load: %s", err.message);
        run_prompt(m, ids, 1, got);
        same("nodes, token by token", got, want, (size_t)PROMPT * VOCAB);
        run_prompt(m, ids, PROMPT, got);
        same("nodes, whole prompt", got, want, (size_t)PROMPT * VOCAB);
        check_neighbours(m, ids, want);
        dsv4_model_destroy(m);
    }
    snprintf(command, sizeof command, "rm -r %s", folder);
    check_true(system(command) == 0, "removing");
}

void check_engine(void) {
    struct file *f = make_file();
    int32_t ids[64];
    float *want = malloc(sizeof(float) * PROMPT * VOCAB), *got = malloc(sizeof(float) * PROMPT * VOCAB);
    float *edited = malloc(sizeof(float) * PROMPT * VOCAB);
    dsv4_error err;
    for (int i = 0; i < 64; i++)
        ids[i] = (int32_t)check_below(VOCAB);
    for (int threads = 1; threads <= 3; threads++) {
        dsv4_model *m;
        check_true(load(&m, f, threads, threads == 2 ? 13 : 0, threads != 3, &err) == DSV4_OK, "load: %s", err.message);
        run_prompt(m, ids, threads == 1 ? PROMPT : 1, threads == 1 ? want : got);
        if (threads > 1)
            same("token by token", got, want, (size_t)PROMPT * VOCAB);
        run_prompt(m, ids, 7, got);
        same("pieces of 7", got, want, (size_t)PROMPT * VOCAB);
        check_neighbours(m, ids, want);
        check_atomic(m, ids, want);
        check_edits(m, ids, want, edited, got, threads == 1);
        dsv4_model_destroy(m);
    }
    check_from_disk(f, ids, want, got);
    check_shrunk(f, ids);
    check_nodes(f, ids, want, got);
    check_refusals(f);
    check_nonfinite(f, ids);
    free(want);
    free(got);
    free(edited);
    free(f->bytes);
    free(f);
}
