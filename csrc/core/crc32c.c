/* SPDX-License-Identifier: Apache-2.0 */
#include "core/crc32c.h"

#include <string.h>

static const uint32_t POLYNOMIAL = 0x82f63b78u;

/* Four bits at a time: a table of 16 words needs no set-up. */
uint32_t dsv4_crc32c_portable(uint32_t crc, const void *data, size_t n) {
    uint32_t table[16];
    const uint8_t *p = data;
    for (uint32_t i = 0; i < 16; i++) {
        uint32_t c = i;
        for (int bit = 0; bit < 4; bit++)
            c = c & 1 ? c >> 1 ^ POLYNOMIAL : c >> 1;
        table[i] = c;
    }
    crc = ~crc;
    for (size_t i = 0; i < n; i++) {
        crc ^= p[i];
        crc = crc >> 4 ^ table[crc & 15];
        crc = crc >> 4 ^ table[crc & 15];
    }
    return ~crc;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) static uint32_t by_instruction(uint32_t crc, const uint8_t *p, size_t n) {
    uint64_t c = ~crc;
    for (; n >= 8; n -= 8, p += 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        c = __builtin_ia32_crc32di(c, word);
    }
    crc = (uint32_t)c;
    for (; n; n--)
        crc = __builtin_ia32_crc32qi(crc, *p++);
    return ~crc;
}

uint32_t dsv4_crc32c(uint32_t crc, const void *data, size_t n) {
    return __builtin_cpu_supports("sse4.2") ? by_instruction(crc, data, n) : dsv4_crc32c_portable(crc, data, n);
}
#else
uint32_t dsv4_crc32c(uint32_t crc, const void *data, size_t n) {
    return dsv4_crc32c_portable(crc, data, n);
}
#endif
