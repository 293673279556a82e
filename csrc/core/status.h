/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The one error convention of the engine: functions return a dsv4_status (0 is success), details go to a nullable
 * dsv4_error, the last parameter.  A failed call leaves its outputs and objects as they were.
 */
#ifndef DSV4_STATUS_H
#define DSV4_STATUS_H

typedef enum dsv4_status {
    DSV4_OK = 0,
    DSV4_E_ARGUMENT = -1,  /* a value out of range; the message names it, what was got and the limits */
    DSV4_E_FORMAT = -2,    /* a file is not what it says */
    DSV4_E_MEMORY = -3,    /* an allocation failed or would not fit */
    DSV4_E_IO = -4,        /* the operating system refused */
    DSV4_E_CANCELLED = -5, /* dsv4_run_cancel was called; nothing changed */
    DSV4_E_NONFINITE = -6, /* a logit is NaN or infinite; dsv4_error.layer says where it began */
    DSV4_E_STATE = -7,     /* the object cannot do this now: closed, or used in a forked child */
    DSV4_E_UNAVAILABLE = -8, /* a device that this machine or this build does not have */
    DSV4_E_DEVICE = -9,    /* a device failed: what lies on it is lost */
} dsv4_status;

typedef struct dsv4_error {
    dsv4_status code;
    int layer; /* DSV4_E_NONFINITE: first layer with a non-finite stream, -1 if none (the head) */
    char message[512];
} dsv4_error;

/* Records code and a printf-style message that names the object, what was got and what was wanted; returns code. */
dsv4_status dsv4_fail(dsv4_error *err, dsv4_status code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

#define DSV4_TRY(call)                                                                                                 \
    do {                                                                                                               \
        dsv4_status status_ = (call);                                                                                  \
        if (status_ != DSV4_OK)                                                                                        \
            return status_;                                                                                            \
    } while (0)

#endif
