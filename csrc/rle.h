// Run-length codes of packed masks, column-major and starting with the run of zeros (the COCO convention), and COCO's
// compressed string. Codes of several masks lie one behind the other: those of mask n are [offsets[n], offsets[n+1]).
#pragma once

#include <cstdint>

namespace sam_fast {

// Where a mask of height x width pixels lies in an image of canvas_height x canvas_width pixels: pixel (0, 0) of the
// mask is pixel (x0, y0) of the canvas, and the mask is inside the canvas.
struct Placement {
  int64_t height, width, canvas_height, canvas_width, x0, y0;
};

// offsets [N+1] of the codes that rle_encode will write, from bits [N, height, row_bytes(width)].
void rle_offsets(int64_t* offsets, const uint8_t* bits, int64_t n, const Placement& place, int num_threads);

// counts [offsets[N]]: the run lengths of the masks on their canvas; they add up to its number of pixels.
// Scratch memory: 16 bytes for each run of the mask that has most of them, times the number of threads.
void rle_encode(int64_t* counts, const int64_t* offsets, const uint8_t* bits, int64_t n, const Placement& place,
                int num_threads);

// bits [N, height, row_bytes(width)] from run lengths. Returns -1, or the first mask whose counts are negative or do
// not add up to height * width (bits is then unspecified).
int64_t rle_decode(uint8_t* bits, const int64_t* counts, const int64_t* offsets, int64_t n, int64_t height,
                   int64_t width, int num_threads);

// offsets [N+1] of the strings that rle_compress will write.
void rle_compressed_offsets(int64_t* string_offsets, const int64_t* counts, const int64_t* offsets, int64_t n);

// text [string_offsets[N]]: COCO's strings, ASCII without terminating zeros.
void rle_compress(uint8_t* text, const int64_t* string_offsets, const int64_t* counts, const int64_t* offsets,
                  int64_t n, int num_threads);

// counts [length]: what one string says. Returns how many counts it holds, or -1 - (position of the character that
// makes it invalid; `length` when it ends inside a number).
int64_t rle_decompress(int64_t* counts, const uint8_t* text, int64_t length);

// ---- On a GPU; bits start at a multiple of 8 bytes.

// offsets [N+1] as rle_offsets; columns [N, width+1]: where the runs that start in each column begin in a mask's codes.
void rle_offsets_cuda(int64_t* offsets, int64_t* columns, const uint8_t* bits, int64_t n, const Placement& place,
                      void* stream);

// ends [offsets[N]]: the sums of the run lengths up to each run of a mask, from what rle_offsets_cuda wrote.
void rle_ends_cuda(int64_t* ends, const int64_t* offsets, const int64_t* columns, const uint8_t* bits, int64_t n,
                   const Placement& place, void* stream);

// counts [offsets[N]] from ends.
void rle_counts_cuda(int64_t* counts, const int64_t* ends, const int64_t* offsets, int64_t n, void* stream);

// text [capacity]: COCO's strings; string n is [string_offsets[n], string_offsets[n+1]). Where the last string ends
// above `capacity`, strings are incomplete.
void rle_strings_cuda(uint8_t* text, int64_t capacity, int64_t* string_offsets, const int64_t* counts,
                      const int64_t* offsets, int64_t n, void* stream);

// bits [N, height, row_bytes(width)] from sums [R+1] of the run lengths before each run; runs that are not inside the
// mask are left out.
void rle_decode_cuda(uint8_t* bits, const int64_t* sums, const int64_t* offsets, int64_t n, int64_t height,
                     int64_t width, void* stream);

}  // namespace sam_fast
