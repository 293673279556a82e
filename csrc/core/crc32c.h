/* SPDX-License-Identifier: Apache-2.0 */
/* CRC-32C (Castagnoli, reflected 0x82f63b78; RFC 3720 appendix B.4), by the processor's instruction where it has one. */
#ifndef DSV4_CRC32C_H
#define DSV4_CRC32C_H

#include <stddef.h>
#include <stdint.h>

/* Of the bytes that gave `crc` (0 for none) followed by these n. */
uint32_t dsv4_crc32c(uint32_t crc, const void *data, size_t n);
/* The portable way to the same value; for tests. */
uint32_t dsv4_crc32c_portable(uint32_t crc, const void *data, size_t n);

#endif
