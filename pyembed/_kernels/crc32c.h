/* CRC-32C (Castagnoli polynomial, reflected 0x82F63B78), the checksum of the manifest. */
#ifndef PYEMBED_CRC32C_H
#define PYEMBED_CRC32C_H

#include <stddef.h>
#include <stdint.h>

static inline uint32_t pe_crc32c(uint32_t crc, const unsigned char *data, size_t size) {
    crc = ~crc;
    for (size_t i = 0; i < size; i++) {
        crc ^= data[i];
        for (int bit = 0; bit < 8; bit++) crc = (crc >> 1) ^ (0x82F63B78u & (0u - (crc & 1)));
    }
    return ~crc;
}

#endif
