/* How a plan lies in one buffer, and the numbers of its layout: see deft_tvm/plan/buffer.py. */
#ifndef DEFT_TVM_PLAN_BUFFER_H
#define DEFT_TVM_PLAN_BUFFER_H

enum { HEADER = 8, COLUMNS = 7 };

/* Columns of runs and items, as deft_tvm/plan/columns.py names them. */
enum {
  RUN_OFFSET,
  RUN_PAGE_BEGIN,
  RUN_FIRST_SLOT,
  RUN_ROW_BEGIN,
  RUN_ROW_END,
  RUN_DIAGONAL,
  RUN_POSITION
};
enum {
  ITEM_ROW_BEGIN,
  ITEM_NUM_ROWS,
  ITEM_RUN_BEGIN,
  ITEM_RUN_END,
  ITEM_NUM_TOKENS,
  ITEM_DEST_BEGIN,
  ITEM_LAST_POSITION
};

enum { PAGED, NEEDED, PARTIALS, PAGES, ROWS, POSITIONS, RUNS, DESTS, MERGED, ITEMS };

#endif
