/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sites: the places of a pass where pieces (stretches of one session) may look at a token's values.
 * Where no piece of the pass asks for anything at a site, it costs one test of a flag; compiled with DSV4_WITHOUT_SITES
 * not even that (for counting instructions, never shipped).
 *
 * dsv4_at copies what the token's own piece asks for, on the worker that has the token at hand.  What a session changes
 * (model/edit.h) is changed before: what is copied is what the pass goes on with.
 */
#ifndef DSV4_SITES_H
#define DSV4_SITES_H

#include "model/pass.h"

enum dsv4_site {
    DSV4_SITE_STREAMS_IN,     /* x: [hc][d] before the layer */
    DSV4_SITE_ATTENTION_MIX,  /* pre (used up already), post [hc], comb [hc][hc]; private */
    DSV4_SITE_ATTENTION_IN,   /* x: [d] what the sublayer reads, normed, not yet rounded to an operand; private */
    DSV4_SITE_KV,             /* row: as stored; the entry that closes with this token is in the session; private */
    DSV4_SITE_INDEX_SCORES,   /* scores [n] of the entries before the choice; n = 0: all are selected unseen */
    DSV4_SITE_INDEX_SELECTED, /* ids [*n_ids], ascending, at most index_topk */
    DSV4_SITE_KEYS,           /* keys (NULL: masked), attention: the call that follows, of the heads from h0 on */
    DSV4_SITE_HEADS,          /* x: [n][D] what heads h0 ... h0 + n give, turned back, not yet flushed */
    DSV4_SITE_ATTENTION_OUT,  /* x: [d] */
    DSV4_SITE_STREAMS_MID,    /* x: [hc][d] between the two sublayers */
    DSV4_SITE_FFN_MIX,        /* like ATTENTION_MIX; private */
    DSV4_SITE_FFN_IN,         /* like ATTENTION_IN; private */
    DSV4_SITE_ROUTER,         /* ids, weights [top_k] in the order of choice, scores [n] before the bias; private */
    DSV4_SITE_FFN_OUT,        /* x: [d] */
    DSV4_SITE_STREAMS,        /* x: [hc][d] after the layer */
    DSV4_SITES
};

/* What pieces of a pass ask for in one layer; bit i: site i. */
struct dsv4_asked {
    uint32_t sites;
};

static inline int dsv4_asked(const struct dsv4_pass *p, int32_t layer, enum dsv4_site site) {
#ifdef DSV4_WITHOUT_SITES
    (void)p, (void)layer, (void)site;
    return 0;
#else
    return p->asked && (p->asked[layer].sites >> site & 1);
#endif
}

/* What a site shows of one token: where it lies in the pass.  The enum says which fields are set. */
struct dsv4_sight {
    enum dsv4_site site;
    int32_t layer, tok; /* index in the pass */
    int32_t h0, n;
    dsv4_bf16 *x;
    const float *pre;
    float *post, *comb;
    const uint8_t *row;
    int32_t *ids, *n_ids;
    float *weights, *scores;
    const uint8_t **keys;
    struct dsv4_attention_args *attention;
};

/* Where a value is seen. */
enum dsv4_site dsv4_site_of(int32_t value);

/* Does what the piece of the token asks for there. */
void dsv4_at(const dsv4_worker *w, const struct dsv4_pass *p, const struct dsv4_sight *s);

/* All tokens at a site of streams or of a sublayer's output, complete since the last barrier, cut by tokens. */
void dsv4_at_tokens(const dsv4_worker *w, const struct dsv4_pass *p, int32_t layer, enum dsv4_site site);
/* The same after every worker has made its columns of the output. */
int dsv4_at_columns(dsv4_worker *w, struct dsv4_pass *p, int32_t layer, enum dsv4_site site);

/* Fills asked[layers] from the pieces of a planned pass; NULL when none of them asks for anything. */
const struct dsv4_asked *dsv4_sites_asked(const struct dsv4_pass *p, struct dsv4_asked *asked);

/* Whether a segment's taps (or NULL) name values their layers have, and have room for n tokens from `position` on. */
dsv4_status dsv4_sites_check(const dsv4_model *m, const struct dsv4_tap *taps, int32_t position, int32_t n,
                             dsv4_error *err);

/*
 * attention_weights.c: for heads h0 ... of a token, out + h0 ld, ld = 1 + sliding_window + n_rank: the weight of the
 * sink, of the ranks of the window, and of n_rank compressed ones.
 */
void dsv4_attention_weights(const dsv4_worker *w, const struct dsv4_pass *p, const struct dsv4_sight *s, float *out,
                            int32_t n_rank);

/* Most streams a model may have (dsv4_model_create). */
enum { DSV4_MOST_STREAMS = 8 };

#endif
