// Pillow's 8-bit bilinear resize, to the bit: weights in double, rounded to 22 bits; a pass over each axis; bytes between the passes.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "geometry.hpp"

namespace idefics2 {

constexpr int kWeightBits = 22;
constexpr int64_t kPatchSide = 14;
constexpr int64_t kPatchValues = 3 * kPatchSide * kPatchSide;
// Rows that a pass writes may be written this far past their last pixel; rows that a pass reads are never read past theirs.
constexpr int64_t kRowPadding = 64;

// Rows of pixels as bytes: 3 channels (RGB) or 4 (RGBX, the fourth is skipped). Rows may lie any distance apart, backwards too.
struct Source {
    const uint8_t* pixels;
    int64_t row_stride;
    int channels;
    Size size;

    const uint8_t* row(int64_t y) const { return pixels + y * row_stride; }
    Source crop(const Box& box) const { return {row(box.top) + box.left * channels, row_stride, channels, box.size}; }
};

// Where both axes are resized, the first pass rounds for the second: its axis shows. Pillow changed the rule with 13.
enum class PassOrder {
    horizontal_first,  // Pillow up to 12
    shrinking_first,   // Pillow 13: rows first where they shrink by more than twice what the columns do
};

// Which input pixels each output pixel of an axis is made of, and with what weights. An axis that keeps its length has no taps at all.
struct Taps {
    int64_t input = 0;               // the axis's length before
    std::vector<int64_t> first;      // of each output: its first input pixel
    std::vector<int64_t> begin;      // and where its weights begin; one more entry than outputs
    std::vector<int32_t> weights;    // in 1 / 2^22

    bool identity() const { return first.empty(); }
    int64_t outputs() const { return static_cast<int64_t>(first.size()); }
    int64_t count(int64_t output) const { return begin[output + 1] - begin[output]; }
    int64_t end(int64_t output) const { return first[output] + count(output); }
    const int32_t* of(int64_t output) const { return weights.data() + begin[output]; }
    int64_t most() const;
};

// Taps of the first `needed` of `output` pixels that `input` pixels are resized to.
Taps bilinear_taps(int64_t input, int64_t output, int64_t needed);

// One pass along the rows, on `block` rows at once.
class HorizontalPass {
public:
    const int block;
    explicit HorizontalPass(int rows) : block(rows) {}
    virtual ~HorizontalPass() = default;
    // in: `block` rows of taps.input pixels; out: `block` rows of taps.outputs() RGB pixels and kRowPadding. Rows may be given twice.
    virtual void run(const uint8_t* const* in, uint8_t* const* out) const = 0;
};

// One pass across the rows.
class VerticalPass {
public:
    virtual ~VerticalPass() = default;
    // in: the rows of an output, taps.count(output) of them, then as many again of the last as its place says; out: `bytes` bytes.
    static constexpr int kSpareRows = 3;
    virtual void run(int64_t output, const uint8_t* const* in, int64_t bytes, uint8_t* out) const = 0;
};

// What becomes of a byte: entry `byte` of a table of 256 values of 1, 2 or 4 bytes.
struct Values {
    int64_t bytes;
    const uint8_t* table;
    bool normalised;  // the table is Hugging Face's normalisation in float32 or bfloat16, which can be computed instead
};

// 14 rows of 14 * columns pixels into `columns` patches of 588 bytes (channel, row, column), one after another. No other byte is written.
using CutPatches = void (*)(const uint8_t* const* rows, int channels, int64_t columns, uint8_t* out);
// `count` bytes, and what becomes of them.
using Convert = void (*)(const uint8_t* bytes, int64_t count, uint8_t* out, const Values& values);

// As memcpy, past the caches.
using Copy = void (*)(const uint8_t* bytes, int64_t count, uint8_t* out);

// One implementation of all inner loops. All give the same bits. The taps must outlive the passes.
struct Kernels {
    const char* name;
    bool (*runs_here)();
    std::unique_ptr<HorizontalPass> (*horizontal)(const Taps& taps, int channels);
    std::unique_ptr<VerticalPass> (*vertical)(const Taps& taps);
    CutPatches cut;
    Convert convert;
    Copy copy;  // null where it would not be faster
};

extern const Kernels scalar_kernels;
extern const Kernels portable_kernels;  // vnni_kernels without their instructions: slow, for tests
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels vnni_kernels;
#endif

// The kernels in use: the fastest this CPU runs, or those that the environment variable IDEFICS2_FAST_SIMD or use_kernels names.
const Kernels& kernels();
void use_kernels(const std::string& name);
std::vector<std::string> kernels_here();

// Receives output rows in order, kPatchSide at a time; the last may be fewer. Rows have 3 or 4 channels, as said with them, and live until
// the receiver returns.
using RowsSink = std::function<void(int64_t y, const std::vector<const uint8_t*>& rows, int channels)>;

// The tables of an axis.
template <class Pass>
struct Axis {
    Taps taps;
    std::unique_ptr<Pass> pass;  // none where the axis keeps its length
};

// A planned resize: its tables, to be used by any number of threads.
class Resampler {
public:
    // `needed` <= output: rows and columns past it are never computed.
    Resampler(Size input, Size output, Size needed, int channels, PassOrder order, const Kernels& with = kernels());
    // Output rows first .. last - 1 of the source.
    void run(const Source& source, int64_t first, int64_t last, const RowsSink& sink) const;

private:
    void run_horizontal_first(const Source& source, int64_t first, int64_t last, const RowsSink& sink) const;
    void run_horizontal_last(const Source& source, int64_t first, int64_t last, const RowsSink& sink) const;
    void run_vertical(const Source& source, int64_t first, int64_t last, const RowsSink& sink) const;

    // Shared with other resizes of the same length to the same length: most images of a batch, and of the next.
    std::shared_ptr<const Axis<HorizontalPass>> columns_;
    std::shared_ptr<const Axis<VerticalPass>> rows_;
    Size needed_;
    bool vertical_first_;
};

}  // namespace idefics2
