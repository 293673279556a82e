/* SPDX-License-Identifier: Apache-2.0 */
/* One timeline: its state (gen/kvcache.h) and earlier ones to return to.  The lock is held by whoever reads or changes it; a step holds the locks of
 * all its sessions from start to finish. */
#ifndef DSV4_SESSION_H
#define DSV4_SESSION_H

#include <pthread.h>

#include "gen/kvcache.h"

struct dsv4_session {
    dsv4_model *model; /* one reference */
    pthread_mutex_t lock;
    struct dsv4_kv *kv;    /* one reference */
    struct dsv4_kv **kept; /* owned [most_kept]: earlier states to rewind to, ascending positions, one reference each */
    int32_t n_kept, most_kept;
    dsv4_edit *edit; /* one reference, or NULL */
};

/* Keeps the present state for rewinding, forgetting the oldest kept one if need be. */
void dsv4_session_keep_locked(dsv4_session *s);

/* A session in this state, of which it takes a reference. */
dsv4_status dsv4_session_of(dsv4_session **out, dsv4_model *model, struct dsv4_kv *kv, int32_t most_kept,
                            dsv4_error *err);

#endif
