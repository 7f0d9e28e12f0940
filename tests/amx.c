/* AMX's instructions as the Intel SDM describes them, for processors that lack them. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  uint8_t palette, start_row, zero[14];
  uint16_t row_bytes[8], zero_too[8];
  uint8_t rows[8], zero_again[8];
} Config;
_Static_assert(sizeof(Config) == 64, "LDTILECFG reads 64 bytes");

static _Thread_local Config config;
static _Thread_local uint8_t tiles[8][16][64];

static void demand(int holds, const char *what) {
  if (holds) return;
  fprintf(stderr, "#UD or #GP: %s\n", what);
  abort();
}

static void demand_configured(int tile) {
  demand(config.palette == 1, "tiles are not configured");
  demand(config.rows[tile] && config.row_bytes[tile], "a tile is not configured");
}

void emulated_sttilecfg(void *to) { memcpy(to, &config, sizeof config); }

void emulated_ldtilecfg(const void *from) {
  Config wanted;
  memcpy(&wanted, from, sizeof wanted);
  demand(wanted.palette <= 1, "palette");
  if (!wanted.palette) memset(&wanted, 0, sizeof wanted);
  for (int t = 0; t < 8; ++t)
    demand(wanted.rows[t] <= 16 && wanted.row_bytes[t] <= 64, "a tile is too large");
  config = wanted;
  memset(tiles, 0, sizeof tiles);
}

void emulated_tilezero(int8_t tile) {
  demand_configured(tile);
  memset(tiles[tile], 0, sizeof tiles[tile]);
}

void emulated_tileloadd64(int8_t tile, const uint8_t *from, int64_t stride) {
  emulated_tilezero(tile);
  for (int r = 0; r < config.rows[tile]; ++r)
    memcpy(tiles[tile][r], from + r * stride, config.row_bytes[tile]);
}

void emulated_tilestored64(int8_t tile, uint8_t *to, int64_t stride) {
  demand_configured(tile);
  for (int r = 0; r < config.rows[tile]; ++r)
    memcpy(to + r * stride, tiles[tile][r], config.row_bytes[tile]);
}

static float bfloat16(const uint8_t *at) {
  uint16_t bits;
  memcpy(&bits, at, sizeof bits);
  uint32_t wide = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}

void emulated_tdpbf16ps(int8_t c, int8_t a, int8_t b) {
  demand_configured(c), demand_configured(a), demand_configured(b);
  demand(c != a && c != b && a != b, "tiles must differ");
  demand(config.row_bytes[a] / 4 == config.rows[b], "depths must agree");
  demand(config.rows[c] == config.rows[a], "rows must agree");
  demand(config.row_bytes[c] == config.row_bytes[b], "columns must agree");
  for (int m = 0; m < config.rows[c]; ++m)
    for (int k = 0; k < config.row_bytes[a] / 4; ++k)
      for (int n = 0; n < config.row_bytes[c] / 4; ++n) {
        float sum;
        memcpy(&sum, &tiles[c][m][4 * n], 4);
        for (int r = 0; r < 2; ++r)
          sum += bfloat16(&tiles[a][m][4 * k + 2 * r]) * bfloat16(&tiles[b][k][4 * n + 2 * r]);
        memcpy(&tiles[c][m][4 * n], &sum, 4);
      }
}
