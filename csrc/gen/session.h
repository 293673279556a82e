/* SPDX-License-Identifier: Apache-2.0 */
/* One timeline: its tokens and its KV state.  The lock is held by whoever reads or changes it; a step holds the locks of
 * all its sessions from start to finish. */
#ifndef DSV4_SESSION_H
#define DSV4_SESSION_H

#include <pthread.h>

#include "gen/kvcache.h"

struct dsv4_session {
    dsv4_model *model; /* one reference */
    pthread_mutex_t lock;
    struct dsv4_kv kv;
    int32_t *tokens; /* owned, [capacity] */
    int32_t position, capacity;
};

/* Room for n more tokens. */
dsv4_status dsv4_session_reserve_tokens_locked(dsv4_session *s, int32_t n, dsv4_error *err);

#endif
