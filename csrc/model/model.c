/* SPDX-License-Identifier: Apache-2.0 */
/* Loading: checks of the configuration, mapping, binding, kernel choice, workspace; and the accessors. */
#include <math.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "core/arena.h"
#include "gen/kvcache.h"
#include "model/device.h"
#include "model/experts.h"
#include "model/model.h"
#include "model/pass.h"

enum { MIN_CHUNK = 512, MAX_CHUNK = 4096, TOKENS_PER_EXPERT = 48, MAX_DIM = 1 << 24, MAX_THREADS = 1024 };

static dsv4_status check(const char *name, int64_t got, int64_t low, int64_t high, dsv4_error *err) {
    if (got >= low && got <= high)
        return DSV4_OK;
    return dsv4_fail(err, DSV4_E_FORMAT, "config %s: got %lld, wanted a value in [%lld, %lld]", name, (long long)got,
                     (long long)low, (long long)high);
}

static dsv4_status check_multiple(const char *name, int64_t got, int64_t of, dsv4_error *err) {
    if (got >= 0 && got % of == 0)
        return DSV4_OK;
    return dsv4_fail(err, DSV4_E_FORMAT, "config %s: got %lld, wanted a multiple of %lld", name, (long long)got,
                     (long long)of);
}

static dsv4_status check_ratios(const struct dsv4_config *c, dsv4_error *err) {
    for (int32_t i = 0; i < c->num_hidden_layers; i++)
        if (c->compress_ratios[i] != 0)
            DSV4_TRY(check("compress_ratios", c->compress_ratios[i], 2, 1 << 20, err));
    return DSV4_OK;
}

/* The bounds that the kernels' contracts and the index arithmetic rely on. */
static dsv4_status check_config(const struct dsv4_config *c, dsv4_error *err) {
    DSV4_TRY(check("vocab_size", c->vocab_size, 1, DSV4_SAMPLER_MAX_VOCAB, err));
    DSV4_TRY(check("hidden_size", c->hidden_size, 1, MAX_DIM, err));
    DSV4_TRY(check("num_hidden_layers", c->num_hidden_layers, 1, 4096, err));
    DSV4_TRY(check("num_attention_heads", c->num_attention_heads, 1, 4096, err));
    DSV4_TRY(check("head_dim", c->head_dim, 2, 4096, err));
    DSV4_TRY(check("qk_rope_head_dim", c->qk_rope_head_dim, 2, c->head_dim, err));
    DSV4_TRY(check_multiple("qk_rope_head_dim", c->qk_rope_head_dim, 2, err));
    DSV4_TRY(check_multiple("head_dim - qk_rope_head_dim", c->head_dim - c->qk_rope_head_dim, DSV4_KV_GROUP, err));
    DSV4_TRY(check("q_lora_rank", c->q_lora_rank, 1, MAX_DIM, err));
    DSV4_TRY(check("o_groups", c->o_groups, 1, c->num_attention_heads, err));
    DSV4_TRY(check_multiple("num_attention_heads", c->num_attention_heads, c->o_groups, err));
    DSV4_TRY(check("o_lora_rank", c->o_lora_rank, 1, 1 << 20, err));
    DSV4_TRY(check("moe_intermediate_size", c->moe_intermediate_size, 1, MAX_DIM, err));
    DSV4_TRY(check("n_routed_experts", c->n_routed_experts, 1, 65536, err));
    DSV4_TRY(check("num_experts_per_tok", c->num_experts_per_tok, 1, c->n_routed_experts, err));
    DSV4_TRY(check("num_hash_layers", c->num_hash_layers, 0, INT32_MAX, err));
    DSV4_TRY(check("sliding_window", c->sliding_window, 1, 1 << 20, err));
    DSV4_TRY(check("index_n_heads", c->index_n_heads, 1, 4096, err));
    DSV4_TRY(check("index_head_dim", c->index_head_dim, c->qk_rope_head_dim, 256, err));
    DSV4_TRY(check_multiple("index_head_dim", c->index_head_dim, DSV4_INDEX_GROUP, err));
    if (c->index_head_dim & (c->index_head_dim - 1))
        return dsv4_fail(err, DSV4_E_FORMAT, "config index_head_dim: got %d, wanted a power of two", c->index_head_dim);
    DSV4_TRY(check("index_topk", c->index_topk, 1, 1 << 20, err));
    DSV4_TRY(check("hc_mult", c->hc_mult, 1, 8, err));
    DSV4_TRY(check("hc_sinkhorn_iters", c->hc_sinkhorn_iters, 1, 10000, err));
    DSV4_TRY(check("max_position_embeddings", c->max_position_embeddings, 1, 1 << 28, err));
    return check_ratios(c, err);
}

static dsv4_status copy_tensors(dsv4_model *m, const struct dsv4_tensor_desc *tensors, int32_t n, dsv4_error *err) {
    m->tensors = malloc((size_t)n * sizeof *tensors + 1);
    if (!m->tensors)
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for a table of %d tensors", n);
    m->n_tensor = n;
    size_t bytes = 0;
    for (int32_t i = 0; i < n; i++)
        bytes += strlen(tensors[i].name) + 1;
    char *names;
    DSV4_TRY(dsv4_arena_take(m->arena, &names, bytes, 1, err));
    for (int32_t i = 0; i < n; i++) {
        size_t length = strlen(tensors[i].name) + 1;
        m->tensors[i] = tensors[i];
        m->tensors[i].name = memcpy(names, tensors[i].name, length);
        names += length;
    }
    return DSV4_OK;
}

static dsv4_status derive(dsv4_model *m, dsv4_error *err) {
    struct dsv4_config *c = &m->config;
    int32_t *ratios;
    float *main_table, *compressed;
    size_t n_layer = (size_t)c->num_hidden_layers, n_pair = (size_t)c->qk_rope_head_dim / 2;
    DSV4_TRY(dsv4_arena_take(m->arena, &ratios, n_layer, sizeof *ratios, err));
    memcpy(ratios, c->compress_ratios, n_layer * sizeof *ratios);
    c->compress_ratios = ratios;
    DSV4_TRY(dsv4_arena_take(m->arena, &main_table, n_pair, sizeof *main_table, err));
    DSV4_TRY(dsv4_arena_take(m->arena, &compressed, n_pair, sizeof *compressed, err));
    dsv4_rope_frequencies(main_table, compressed, c);
    m->freq_main = main_table;
    m->freq_compressed = compressed;
    m->softmax_scale = (float)(1.0 / sqrt(c->head_dim));
    m->index_w_scale = (float)(1.0 / sqrt(c->index_head_dim) * (1.0 / sqrt(c->index_n_heads)));
    m->kv_format = m->options.april_kv ? DSV4_KV_BF16 : DSV4_KV_FP8;
    m->kv_row = dsv4_kv_row_bytes(m->kv_format, c->head_dim, c->qk_rope_head_dim);
    m->index_row = dsv4_index_row_bytes(c->index_head_dim);
    return DSV4_OK;
}

static dsv4_status choose_kernels(dsv4_model *m, dsv4_error *err) {
    const char *unknown = dsv4k_cpu_init(&m->k, m->chosen, m->options.disable);
    if (!unknown)
        return DSV4_OK;
    char known[256] = "";
    for (int i = 0; dsv4k_cpu_set_names[i]; i++) {
        strncat(known, i ? ", " : "", sizeof known - strlen(known) - 1);
        strncat(known, dsv4k_cpu_set_names[i], sizeof known - strlen(known) - 1);
    }
    return dsv4_fail(err, DSV4_E_ARGUMENT, "instruction sets to disable: got \"%s\", wanted names out of %s", unknown,
                     known[0] ? known : "none on this processor");
}

/*
 * The default: one thread per physical core, but no more than control groups allow and than the weights can feed.  A
 * step of a small model is shorter than the barriers of a team whose neighbours hold a core (150 tokens of a 9 MB model
 * on two busy cores: 0.2 s with one thread, 7 s with two).
 */
static int32_t thread_count(const struct dsv4_topology *topology, const struct dsv4_options *options,
                            const struct dsv4_shard_desc *shards, int32_t n_shard) {
    const uint64_t bytes_per_thread = 16 << 20;
    uint64_t bytes = 0;
    if (options->n_thread)
        return options->n_thread;
    for (int32_t i = 0; i < n_shard; i++)
        bytes += shards[i].size;
    int32_t most = dsv4_topology_threads(topology);
    return bytes / bytes_per_thread + 1 < (uint64_t)most ? (int32_t)(bytes / bytes_per_thread) + 1 : most;
}

/*
 * Tokens per pass: so many that an expert sees TOKENS_PER_EXPERT of them, which pays for decoding its weights, as far as
 * the workspace stays small beside the model.
 */
static int32_t default_chunk(const struct dsv4_config *c) {
    int64_t n = (int64_t)TOKENS_PER_EXPERT * c->n_routed_experts / c->num_experts_per_tok;
    return n < MIN_CHUNK ? MIN_CHUNK : n > MAX_CHUNK ? MAX_CHUNK : (int32_t)n;
}

dsv4_status dsv4_load_job(dsv4_model *m, dsv4_job_fn *fn, void *ctx, const atomic_ullong *done, uint64_t total,
                          dsv4_error *err) {
    int running = 1, cancelled = 0;
    DSV4_TRY(dsv4_team_start(m->team, fn, ctx, err));
    while (running) { /* the last report comes after the work is done */
        running = dsv4_team_wait(m->team, 50);
        if (m->options.progress && m->options.progress(m->options.progress_arg, atomic_load(done), total))
            cancelled = 1;
        if (running && cancelled)
            dsv4_team_cancel(m->team);
    }
    dsv4_team_finish(m->team);
    return cancelled ? dsv4_fail(err, DSV4_E_CANCELLED, "the load was cancelled") : DSV4_OK;
}

static dsv4_status build(dsv4_model *m, const struct dsv4_shard_desc *shards, int32_t n_shard,
                         const struct dsv4_tensor_desc *tensors, int32_t n_tensor, dsv4_error *err) {
    DSV4_TRY(check_config(&m->config, err));
    if (!m->options.chunk_tok)
        m->options.chunk_tok = default_chunk(&m->config);
    DSV4_TRY(check("threads", m->options.n_thread, 0, MAX_THREADS, err));
    DSV4_TRY(check("chunk", m->options.chunk_tok, 1, 1 << 16, err));
    DSV4_TRY(choose_kernels(m, err));
    DSV4_TRY(dsv4_arena_create(&m->arena, err));
    DSV4_TRY(derive(m, err));
    DSV4_TRY(dsv4_topology_read(&m->topology, m->options.root ? m->options.root : "", NULL, 0, err));
    DSV4_TRY(dsv4_team_create(&m->team, thread_count(&m->topology, &m->options, shards, n_shard), err));
    dsv4_team_place(m->team, &m->topology);
    DSV4_TRY(copy_tensors(m, tensors, n_tensor, err));
    m->shards = calloc((size_t)n_shard + 1, sizeof *m->shards);
    if (!m->shards)
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for a table of %d shards", n_shard);
    DSV4_TRY(dsv4_shards_open(m->shards, shards, n_shard, m->options.use_mmap, err));
    m->n_shard = n_shard;
    DSV4_TRY(dsv4_bind_weights(m, err));
    int from_disk = m->options.use_mmap && m->options.expert_bytes;
    if (from_disk)
        DSV4_TRY(dsv4_resident_begin(m, err));
    DSV4_TRY(dsv4_scan_weights(m, err));
    if (from_disk) {
        DSV4_TRY(dsv4_experts_create(&m->cache, m, shards, m->options.expert_bytes, err));
        DSV4_TRY(dsv4_resident_finish(m, shards, err));
    } else if (m->options.use_mmap && m->options.copy_to_nodes && m->topology.n_node > 1) {
        DSV4_TRY(dsv4_place_weights(m, shards, err));
    }
    DSV4_TRY(dsv4_kv_layout(m, err));
    DSV4_TRY(dsv4_workspace_create(&m->workspace, m, err));
    m->options.tensor_cores &= m->options.use_cuda;
    if (!m->options.use_cuda)
        return DSV4_OK;
    return dsv4_pipeline_create(&m->pipeline, m, err);
}

dsv4_status dsv4_model_create(dsv4_model **out, const struct dsv4_config *config, const struct dsv4_shard_desc *shards,
                              int32_t n_shard, const struct dsv4_tensor_desc *tensors, int32_t n_tensor,
                              const struct dsv4_options *options, dsv4_error *err) {
    dsv4_model *m = calloc(1, sizeof *m);
    if (!m)
        return dsv4_fail(err, DSV4_E_MEMORY, "no memory for a model");
    m->config = *config;
    m->options = *options;
    atomic_init(&m->references, 1);
    dsv4_status status = build(m, shards, n_shard, tensors, n_tensor, err);
    m->options.progress = NULL;
    m->options.disable = NULL;
    m->options.root = NULL;
    m->options.cuda_plugin = m->options.cuda_driver = m->options.nccl = NULL;
    m->options.cuda_devices = NULL;
    m->options.hot = NULL;
    if (status != DSV4_OK) {
        dsv4_model_destroy(m);
        return status;
    }
    *out = m;
    return DSV4_OK;
}

void dsv4_model_destroy(dsv4_model *m) {
    if (!m || atomic_fetch_sub(&m->references, 1) > 1)
        return;
    dsv4_run_free(atomic_load(&m->spare));
    dsv4_pipeline_destroy(m->pipeline);
    dsv4_workspace_destroy(m->workspace);
    dsv4_team_destroy(m->team);
    dsv4_experts_destroy(m->cache);
    dsv4_topology_free(&m->topology);
    if (m->placed)
        munmap(m->placed, m->placed_bytes);
    if (m->shards)
        dsv4_shards_close(m->shards, m->n_shard, m->options.use_mmap);
    free(m->shards);
    free(m->tensors);
    dsv4_arena_destroy(m->arena);
    free(m);
}

const struct dsv4_config *dsv4_model_config(const dsv4_model *m) {
    return &m->config;
}

int32_t dsv4_model_threads(const dsv4_model *m) {
    return dsv4_team_size(m->team);
}

int32_t dsv4_model_chunk(const dsv4_model *m) {
    return m->options.chunk_tok;
}

void dsv4_model_experts(const dsv4_model *m, struct dsv4_expert_counts *out) {
    *out = (struct dsv4_expert_counts){0};
    if (m->cache)
        dsv4_experts_count(m->cache, out);
}

int32_t dsv4_kernel_count(void) {
    return DSV4_OP_COUNT;
}

void dsv4_model_kernel(const dsv4_model *m, int32_t i, const char **op, const char **variant) {
    *op = dsv4k_op_name((enum dsv4_op)i);
    *variant = m->chosen[i]->name;
}

dsv4_status dsv4_model_tensor(const dsv4_model *m, const char *name, const void **data, uint64_t *nbytes,
                              dsv4_error *err) {
    const struct dsv4_tensor_desc *t = dsv4_find_tensor(m, name);
    if (!t)
        return dsv4_fail(err, DSV4_E_ARGUMENT, "the model has no tensor named %s", name);
    *data = dsv4_tensor_data(m, t);
    *nbytes = t->nbytes;
    return DSV4_OK;
}
