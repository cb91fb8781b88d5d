// Boxes in order of their scores, in chunks. suppress_kernel compares the boxes of a chunk with all that come later,
// 64 x 64 a block, and stores bits; one block of resolve_kernel then walks through the chunk 64 boxes at a time: a
// thread decides on the 64 by their own bits, and all threads mark what the kept ones suppress. The decisions depend on
// each other, but the 64 * 64 comparisons do not, and of those only the rows of kept boxes are read again. Nothing is
// copied to the host. Limits: n < 2**31; bits of one chunk at a time, at most 4096 rows.
#include <algorithm>

#include "arithmetic.h"
#include "launch.cuh"
#include "nms.h"

namespace sam_fast {
namespace {

constexpr int kWord = 64;
constexpr int kMostRows = 4096;  // of a chunk: their diagonal words fill 32 KB of shared memory
constexpr int kMostWords = kMostRows / kWord;
constexpr int kResolveThreads = 512;
constexpr int kIndexBits = 31;

// What comes in many chunks comes in smaller ones: a chunk's bits take rows * n / 8 bytes.
int64_t chunk_rows(int64_t n) { return n <= kMostRows ? kMostRows : kMostRows / 4; }

__device__ inline int64_t box_index(int64_t key) { return key & ((int64_t{1} << kIndexBits) - 1); }

struct Box {
  float x1, y1, x2, y2, area;
};

__device__ inline Box load_box(const float* boxes, int64_t key) {
  const float* b = boxes + 4 * box_index(key);
  return {b[0], b[1], b[2], b[3], (b[2] - b[0]) * (b[3] - b[1])};
}

// `limit`: as on the CPU, the largest float that is not above the threshold.
__device__ inline bool suppresses(const Box& kept, const Box& box, float limit) {
  const float inter = intersection(kept.x1, kept.y1, kept.x2, kept.y2, box.x1, box.y1, box.x2, box.y2);
  const float uni = kept.area + box.area - inter;
  if (limit >= 0.0f && !may_exceed(inter, uni, limit)) return false;
  return inter / uni > limit;
}

__global__ void key_kernel(int64_t* keys, const float* scores, int64_t n) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += int64_t{gridDim.x} * blockDim.x) {
    keys[i] = static_cast<int64_t>(score_rank(scores[i])) << kIndexBits | i;
  }
}

// Of the chunk that begins at word `first` of `words`.
struct Chunk {
  int64_t n, words, first, count;  // boxes; words of all, and of the chunk
};

// rows [rows of the chunk, words]: bit i of word w of row r says that box r suppresses box 64 * w + i. A block makes
// one word of 64 rows, from the diagonal on.
__global__ void __launch_bounds__(kWord) suppress_kernel(uint64_t* rows, const uint64_t* gone, const int64_t* keys,
                                                         const float* boxes, Chunk chunk, float limit) {
  __shared__ Box columns[kWord];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t width = chunk.words - chunk.first;
  for (int64_t tile = blockIdx.x; tile < chunk.count * width; tile += gridDim.x) {
    const int64_t row_word = tile / width, column_word = tile % width;  // both from the chunk's first
    if (column_word < row_word) continue;
    const int64_t row = (chunk.first + row_word) * kWord + thread, column = (chunk.first + column_word) * kWord;
    __syncthreads();  // the columns of the tile before were read
    if (column + thread < chunk.n) columns[thread] = load_box(boxes, keys[column + thread]);
    __syncthreads();
    if (row >= chunk.n || (gone[chunk.first + row_word] >> thread & 1) != 0) continue;
    const Box mine = load_box(boxes, keys[row]);
    const int end = static_cast<int>(min(int64_t{kWord}, chunk.n - column));
    uint64_t word = 0;
    for (int i = column_word == row_word ? thread + 1 : 0; i < end; ++i) {
      word |= static_cast<uint64_t>(suppresses(mine, columns[i], limit)) << i;
    }
    rows[(row_word * kWord + thread) * chunk.words + chunk.first + column_word] = word;
  }
}

// The boxes of one word that stay, of those `alive`; diagonal [64]: which of the 64 each of them suppresses.
__device__ inline uint64_t resolve_word(uint64_t alive, const uint64_t* diagonal) {
  uint64_t keep = 0;
  while (alive != 0) {
    const int best = __ffsll(static_cast<long long>(alive)) - 1;
    keep |= uint64_t{1} << best;
    alive &= ~(uint64_t{1} << best | diagonal[best]);
  }
  return keep;
}

__global__ void __launch_bounds__(kResolveThreads)
    resolve_kernel(int64_t* kept, int64_t* count, uint64_t* gone, const uint64_t* rows, const int64_t* keys,
                   Chunk chunk) {
  __shared__ uint64_t diagonal[kMostRows], gone_here[kMostWords], keep_here;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t first_box = chunk.first * kWord;
  const int64_t boxes = min(chunk.count * kWord, chunk.n - first_box);
  for (int64_t i = thread; i < boxes; i += kResolveThreads) {
    diagonal[i] = rows[i * chunk.words + chunk.first + i / kWord];
  }
  for (int64_t w = thread; w < chunk.count; w += kResolveThreads) gone_here[w] = gone[chunk.first + w];
  int64_t found = *count;
  for (int64_t w = 0; w < chunk.count; ++w) {
    __syncthreads();
    if (thread == 0) {
      const int64_t left = boxes - w * kWord;
      const uint64_t valid = left >= kWord ? ~uint64_t{0} : (uint64_t{1} << left) - 1;
      keep_here = resolve_word(~gone_here[w] & valid, diagonal + w * kWord);
    }
    __syncthreads();
    const uint64_t keep = keep_here;
    if (thread < kWord && (keep >> thread & 1) != 0) {
      const uint64_t before = keep & ((uint64_t{1} << thread) - 1);
      kept[found + __popcll(before)] = box_index(keys[first_box + w * kWord + thread]);
    }
    found += __popcll(keep);
    for (int64_t j = w + 1 + thread; j < chunk.words - chunk.first; j += kResolveThreads) {
      uint64_t suppressed = 0;
      for (uint64_t rest = keep; rest != 0; rest &= rest - 1) {
        const int64_t row = w * kWord + __ffsll(static_cast<long long>(rest)) - 1;
        suppressed |= rows[row * chunk.words + chunk.first + j];
      }
      uint64_t* word = j < chunk.count ? gone_here + j : gone + chunk.first + j;
      if (suppressed != 0) *word |= suppressed;
    }
  }
  if (thread == 0) *count = found;
}

}  // namespace

void nms_keys_cuda(int64_t* keys, const float* scores, int64_t n, void* stream) {
  launch(key_kernel, ceil_div(n, 256), 256, stream, keys, scores, n);
}

int64_t nms_workspace(int64_t n) {
  const int64_t words = ceil_div(n, kWord);
  return words + std::min(chunk_rows(n), words * kWord) * words;
}

void nms_cuda(int64_t* kept, int64_t* count, int64_t* workspace, const int64_t* keys, const float* boxes, int64_t n,
              double iou_threshold, void* stream) {
  const float limit = largest_float_not_above(iou_threshold);
  const int64_t words = ceil_div(n, kWord), step = chunk_rows(n) / kWord;
  auto* gone = reinterpret_cast<uint64_t*>(workspace);  // [words], bits of suppressed boxes
  uint64_t* rows = gone + words;
  const auto queue = static_cast<cudaStream_t>(stream);
  check_cuda(cudaMemsetAsync(count, 0, sizeof(int64_t), queue), "clearing the count of boxes failed");
  check_cuda(cudaMemsetAsync(gone, 0, static_cast<size_t>(words) * 8, queue), "clearing the boxes' bits failed");
  for (int64_t first = 0; first < words; first += step) {
    const Chunk chunk = {n, words, first, std::min(step, words - first)};
    launch(suppress_kernel, chunk.count * (words - first), kWord, stream, rows, gone, keys, boxes, chunk, limit);
    launch(resolve_kernel, 1, kResolveThreads, stream, kept, count, gone, rows, keys, chunk);
  }
}

}  // namespace sam_fast
