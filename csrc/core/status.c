/* SPDX-License-Identifier: Apache-2.0 */
#include "core/status.h"

#include <stdarg.h>
#include <stdio.h>

dsv4_status dsv4_fail(dsv4_error *err, dsv4_status code, const char *format, ...) {
    if (err) {
        va_list args;
        err->code = code;
        err->layer = -1;
        va_start(args, format);
        vsnprintf(err->message, sizeof err->message, format, args);
        va_end(args);
    }
    return code;
}
