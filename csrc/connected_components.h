// 8-connected components of packed masks, and the removal of small ones.
#pragma once

#include <cstdint>

namespace sam_fast {

// A mask has height * width < 2**31 pixels. Scratch memory: 24 bytes for each horizontal run of the mask that has most
// of them, times the number of threads.

// labels [N, height, width]: 0 outside of the mask, else the number of the component from 1; count [N]: how many there
// are. Components are numbered in the order in which a scan over blocks of 2 x 2 pixels, row of blocks by row of
// blocks, meets them (all pixels of a block are of one component); that is OpenCV's order.
void connected_components(int32_t* labels, int64_t* count, const uint8_t* bits, int64_t n, int64_t height,
                          int64_t width, int num_threads);

// out [N, height, row_bytes(width)]: `bits` without the regions of fewer than `area_threshold` pixels. Fills regions of
// the background if `holes`, else clears regions of the mask; if all of those are small, the largest one (of several,
// the one with the lowest number) is kept. changed [N]: whether there was a small region.
void remove_small_regions(uint8_t* out, bool* changed, const uint8_t* bits, int64_t n, int64_t height, int64_t width,
                          double area_threshold, bool holes, int num_threads);

// ---- On a GPU; bits and out start at a multiple of 8 bytes. Workspaces: blocks [2, N, ceil(height/2) *
// ceil(width/2)], rows [N, ceil(height/2)], judgements [N, kJudgement].
constexpr int64_t kJudgement = 2;
void connected_components_cuda(int32_t* labels, int64_t* count, int32_t* blocks, int64_t* rows, const uint8_t* bits,
                               int64_t n, int64_t height, int64_t width, void* stream);
void remove_small_regions_cuda(uint8_t* out, bool* changed, int32_t* blocks, int64_t* judgements, const uint8_t* bits,
                               int64_t n, int64_t height, int64_t width, double area_threshold, bool holes,
                               void* stream);

}  // namespace sam_fast
