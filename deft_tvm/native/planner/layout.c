/* The arrays of deft_tvm/plan/layout.py, in one buffer. */
#include <stdlib.h>
#include <string.h>

#include "../plan_buffer.h"
#include "native.h"

typedef struct {
  int32_t group, tile;
  double cost;
} Item;

static int by_tile_dearest_first(const void *one, const void *other) {
  const Item *a = one, *b = other;
  if (a->tile != b->tile) return a->tile < b->tile ? -1 : 1;
  if (a->cost != b->cost) return a->cost > b->cost ? -1 : 1;
  return a->group < b->group ? -1 : 1;
}

static int32_t bit_length(uint32_t value) {
  int32_t bits = 0;
  for (; value; value >>= 1) ++bits;
  return bits;
}

static int32_t *copy(int32_t *to, const int32_t *from, int64_t count) {
  memcpy(to, from, (size_t)count * sizeof(int32_t));
  return to + count;
}

static int32_t *narrow(int32_t *to, const int64_t *from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = (int32_t)from[i];
  return to + count;
}

static int32_t *lay_out_runs(int32_t *run, const Walk *walk, const Groups *groups,
                             const Pages *pages) {
  int64_t mask = ((int64_t)1 << pages->page_shift) - 1;
  for (int32_t g = 0; g < groups->count; ++g) {
    int64_t first = 0;
    for (int32_t p = groups->indptr[g]; p < groups->indptr[g + 1]; ++p, run += COLUMNS) {
      int32_t place = groups->node[p], node = walk->node[place];
      int64_t begin = groups->begin[p], slot = pages->first_slot[node] + begin;
      int64_t common = walk->diagonal[place] - begin, seen_by_all = larger(0, common);
      run[RUN_OFFSET] = (int32_t)first;
      run[RUN_PAGE_BEGIN] = (int32_t)(pages->page_indptr[node] + (slot >> pages->page_shift));
      run[RUN_FIRST_SLOT] = (int32_t)(slot & mask);
      run[RUN_ROW_BEGIN] = (int32_t)(walk->row_begin[place] + (seen_by_all - common));
      run[RUN_ROW_END] = walk->row_end[place];
      run[RUN_DIAGONAL] = (int32_t)seen_by_all;
      run[RUN_POSITION] = (int32_t)(walk->start[place] + begin);
      first += groups->end[p] - begin;
    }
  }
  return run;
}

/* All items in the last class that they have, if that ends earlier than one class after another. */
static void join_classes(Arena *arena, const Groups *groups, const Prices *prices, Price *chosen) {
  int32_t count = groups->count, *in_class = TAKE(arena, int32_t, prices->classes);
  Price *joined = TAKE(arena, Price, count), *scratch = TAKE(arena, Price, count);
  int32_t classes = 0, last = 0;
  for (int32_t tile = 0; tile < prices->classes; ++tile) in_class[tile] = 0;
  for (int32_t g = 0; g < count; ++g) ++in_class[chosen[g].tile];
  for (int32_t tile = 0; tile < prices->classes; ++tile)
    if (in_class[tile]) last = tile, ++classes;
  if (classes < 2) return;
  double apart = prices->launch_seconds * (double)(classes - 1);
  apart += by_class(prices, chosen, count, joined, scratch);
  for (int32_t g = 0; g < count; ++g)
    joined[g] = price_in(prices, last, groups->tokens[g], group_rows(groups, g));
  if (makespan(joined, scratch, count, prices->cores) >= apart) return;
  for (int32_t g = 0; g < count; ++g)
    chosen[g] = price_in(prices, last, groups->tokens[g], group_rows(groups, g));
}

static int32_t *lay_out_items(Arena *arena, int32_t *item, const Groups *groups,
                              const Prices *prices, int64_t *items_of) {
  Item *order = TAKE(arena, Item, groups->count);
  int32_t *dest = TAKE(arena, int32_t, groups->count), dests = 0;
  Price *chosen = TAKE(arena, Price, groups->count);
  int sorted = 1;
  for (int32_t g = 0; g < groups->count; ++g)
    chosen[g] = choose_tile(prices, groups->tokens[g], group_rows(groups, g));
  if (prices->joins) join_classes(arena, groups, prices, chosen);
  for (int32_t g = 0; g < groups->count; ++g) {
    int32_t rows = group_rows(groups, g);
    Price price = chosen[g];
    order[g] = (Item){g, price.tile, price.seconds};
    dest[g] = dests;
    dests += rows;
    ++items_of[price.tile];
    sorted = sorted && (!g || by_tile_dearest_first(&order[g - 1], &order[g]) < 0);
  }
  if (!sorted) qsort(order, (size_t)groups->count, sizeof *order, by_tile_dearest_first);
  for (int32_t i = 0; i < groups->count; ++i, item += COLUMNS) {
    int32_t g = order[i].group;
    item[ITEM_ROW_BEGIN] = groups->row_begin[g];
    item[ITEM_NUM_ROWS] = groups->row_end[g] - groups->row_begin[g];
    item[ITEM_RUN_BEGIN] = groups->indptr[g];
    item[ITEM_RUN_END] = groups->indptr[g + 1];
    item[ITEM_NUM_TOKENS] = (int32_t)groups->tokens[g];
    item[ITEM_DEST_BEGIN] = dest[g];
    item[ITEM_LAST_POSITION] = 0;
  }
  return item;
}

typedef struct {
  int32_t *counts; /* [rows], items that each is in */
  int64_t dests, merged, slots;
} Partials;

static Partials count_partials(Arena *arena, const Walk *walk, const Groups *groups) {
  Partials found = {.counts = covers_of(arena, walk, groups)};
  for (int32_t row = 0; row < walk->num_rows; ++row) {
    int32_t count = found.counts[row];
    found.dests += count;
    if (count == 1) continue;
    ++found.merged;
    found.slots += count;
  }
  return found;
}

static void number_partials(Arena *arena, const Walk *walk, const Groups *groups,
                            const int32_t *row_order, Partials partials, int32_t *dests,
                            int32_t *merge_rows, int32_t *merge_indptr) {
  int32_t *next = TAKE(arena, int32_t, walk->num_rows), slot = 0;
  *merge_indptr++ = 0;
  for (int32_t row = 0; row < walk->num_rows; ++row) {
    next[row] = slot;
    if (partials.counts[row] == 1) continue;
    *merge_rows++ = row_order[row];
    *merge_indptr++ = slot += partials.counts[row];
  }
  for (int32_t g = 0; g < groups->count; ++g)
    for (int32_t row = groups->row_begin[g]; row < groups->row_end[g]; ++row)
      *dests++ = partials.counts[row] == 1 ? ~row_order[row] : next[row]++;
}

static int64_t num_tokens(const Forest *forest) {
  int64_t total = 0;
  for (int64_t i = 0; i < forest->num_nodes; ++i) total += forest->lengths[i];
  return total;
}

/* Writes the plan, and to sizes[1…] the size of what kernels read, that of all and the layout.
 * Returns 0, or the room that is needed. */
int64_t lay_out(Arena *arena, const Walk *walk, const Groups *groups, const Forest *forest,
                const Pages *pages, const Prices *prices, int32_t *out, int64_t room,
                int64_t *sizes) {
  Partials partials = count_partials(arena, walk, groups);
  int64_t rows = forest->num_rows, runs = groups->pieces, items = groups->count;
  int64_t size = HEADER + pages->num_pages + rows + runs * COLUMNS + partials.dests +
                 2 * partials.merged + 1 + items * COLUMNS;
  int64_t total = size + 3 * runs + 3 * items + 1; /* the groups */
  if (total > room) return total;
  int32_t most_runs = 1;
  for (int32_t g = 0; g < groups->count; ++g)
    most_runs = (int32_t)larger(most_runs, groups->indptr[g + 1] - groups->indptr[g]);
  int32_t header[HEADER] = {(int32_t)pages->page_shift, bit_length((uint32_t)most_runs - 1)};
  int32_t *to = copy(out, header, HEADER);
  to = copy(to, pages->page_indices, pages->num_pages);
  to = copy(to, forest->row_order, rows);
  to = lay_out_runs(to, walk, groups, pages);
  int32_t *merge_rows = to + partials.dests, *merge_indptr = merge_rows + partials.merged;
  number_partials(arena, walk, groups, forest->row_order, partials, to, merge_rows, merge_indptr);
  int64_t *layout = sizes + 3, *items_of = layout + ITEMS;
  memset(items_of, 0, (size_t)prices->classes * sizeof(int64_t));
  to = lay_out_items(arena, merge_indptr + partials.merged + 1, groups, prices, items_of);
  to = copy(to, groups->node, runs);
  to = narrow(to, groups->begin, runs);
  to = narrow(to, groups->end, runs);
  to = copy(to, groups->indptr, items + 1);
  to = copy(to, groups->row_begin, items);
  copy(to, groups->row_end, items);
  sizes[1] = size;
  sizes[2] = total;
  layout[PAGED] = !pages->is_contiguous;
  layout[NEEDED] = pages->is_contiguous ? num_tokens(forest) : pages->max_page + 1;
  layout[PARTIALS] = partials.slots;
  layout[PAGES] = pages->num_pages;
  layout[ROWS] = rows;
  layout[POSITIONS] = 0; /* there is no window */
  layout[RUNS] = runs;
  layout[DESTS] = partials.dests;
  layout[MERGED] = partials.merged;
  return 0;
}
