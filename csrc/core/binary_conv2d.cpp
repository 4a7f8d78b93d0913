// binary_conv2d: the signs of images are packed once, with their padding, and their windows are the rows of a binary
// product.
//
// In bits padding is +1, as there is no 0. What it adds to a dot is the sum of the weights that lie on padding, which
// is subtracted again. That sum is the same for all windows with the same part outside: there are at most 9 such
// classes for a 3x3 kernel with padding 1, and they are found by the product itself. Where row 0 is +1 everywhere, and
// row c is -1 on the padding of class c, half of the difference of their dots is what class c subtracts.
#include <algorithm>
#include <cstring>

#include "core/binary_call.h"
#include "core/checks.h"
#include "core/scratch.h"
#include "core/windows.h"

namespace kdq {
namespace {

// Which of a kernel's taps along one side lie inside of the image, for each output along that side.
class Side {
 public:
  struct Inside {
    int64_t first;
    int64_t end;
    bool operator==(const Inside& other) const { return first == other.first && end == other.end; }
  };

  Side(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation)
      : size_(size), kernel_(kernel), stride_(stride), padding_(padding), dilation_(dilation) {}

  Inside inside(int64_t output) const {
    const int64_t start = output * stride_ - padding_;
    const auto taps_below = [&](int64_t position) {  // how many taps lie before it
      return std::clamp<int64_t>((position - start + dilation_ - 1) / dilation_, 0, kernel_);
    };
    const int64_t first = start >= 0 ? 0 : taps_below(0);
    return {first, size_ <= start ? first : std::max(first, taps_below(size_))};
  }

 private:
  int64_t size_, kernel_, stride_, padding_, dilation_;
};

// The classes of windows of a call.
struct Classes {
  const Windows& windows;
  int32_t* of_row;          // [output_height]: the class of each row of outputs,
  int32_t* of_column;       // [output_width]: and of each column
  Side::Inside* row_kinds;  // what is inside, by class
  Side::Inside* column_kinds;
  int64_t n_rows = 0;
  int64_t n_columns = 0;

  static int64_t bytes(const Windows& w) {
    const auto each = static_cast<int64_t>(sizeof(Side::Inside) + sizeof(int32_t));
    return (w.output_height + w.output_width) * each;
  }

  Classes(const Windows& w, char* memory)
      : windows(w),
        of_row(reinterpret_cast<int32_t*>(memory)),
        of_column(of_row + w.output_height),
        row_kinds(reinterpret_cast<Side::Inside*>(memory + (w.output_height + w.output_width + 1) / 2 * 8)),
        column_kinds(row_kinds + w.output_height) {
    const Conv2dShape& s = w.shape;
    const Side rows(s.height, s.kernel_height, s.stride_height, s.padding_height, s.dilation_height);
    const Side columns(s.width, s.kernel_width, s.stride_width, s.padding_width, s.dilation_width);
    n_rows = classify(rows, w.output_height, of_row, row_kinds);
    n_columns = classify(columns, w.output_width, of_column, column_kinds);
  }

  // Kinds come one after the other along a side: comparing with the last is enough.
  static int64_t classify(const Side& side, int64_t outputs, int32_t* of, Side::Inside* kinds) {
    int64_t count = 0;
    for (int64_t i = 0; i < outputs; ++i) {
      const Side::Inside inside = side.inside(i);
      if (count == 0 || !(kinds[count - 1] == inside)) kinds[count++] = inside;
      of[i] = static_cast<int32_t>(count - 1);
    }
    return count;
  }

  int64_t count() const { return n_rows * n_columns; }

  int64_t of(int64_t row, int64_t column) const { return of_row[row] * n_columns + of_column[column]; }

  bool is_complete(int64_t index) const {
    const Conv2dShape& s = windows.shape;
    return row_kinds[index / n_columns] == Side::Inside{0, s.kernel_height} &&
           column_kinds[index % n_columns] == Side::Inside{0, s.kernel_width};
  }

  // The bits of the row of class `index` (see above), or of row 0 where it is -1.
  void write(int64_t index, int64_t words, uint64_t* to) const {
    const Conv2dShape& s = windows.shape;
    std::memset(to, 0, static_cast<size_t>(s.kernel_height * s.kernel_width * words) * sizeof(uint64_t));
    if (index < 0) return;
    const Side::Inside& in_y = row_kinds[index / n_columns];
    const Side::Inside& in_x = column_kinds[index % n_columns];
    for (int64_t y = 0; y < s.kernel_height; ++y) {
      for (int64_t x = 0; x < s.kernel_width; ++x, to += words) {
        if (y >= in_y.first && y < in_y.end && x >= in_x.first && x < in_x.end) continue;
        std::memset(to, 0xFF, static_cast<size_t>(words) * sizeof(uint64_t));
        if (s.channels % 64 != 0) to[words - 1] = (uint64_t{1} << (s.channels % 64)) - 1;
      }
    }
  }
};

Status check(const BinaryConv2d& args, const Windows& windows) {
  const BinaryLinear& layer = args.layer;
  const Conv2dShape& s = args.shape;
  const int64_t taps = s.kernel_height * s.kernel_width;
  Status status = check_binary_sizes(s.images * windows.outputs(), layer.n, taps * s.channels);
  if (status.ok()) status = check_bits("weight_bits", layer.weight_bits, layer.n * taps, s.channels);
  if (status.ok()) status = check_pointer("x", layer.x, s.images);
  if (status.ok()) status = check_pointer("y", layer.y, s.images * layer.n);
  if (status.ok()) status = check_pointer("weight_scale", layer.weight_scale, layer.n);
  return status.ok() ? check_binary_scale(layer.weight_scale, layer.n) : status;
}

// The signs of images first ... first + count - 1, with padding of +1, to `to`.
void pack_images(const BinaryConv2d& args, const BinaryKernels& kernels, const Windows& windows, int64_t first,
                 int64_t count, char* to, const ParallelFor& parallel_for) {
  constexpr int64_t kValuesWorthAThread = 1 << 15;
  const Conv2dShape& s = args.shape;
  const auto pack_row = kernels.pack_row[static_cast<int>(args.layer.dtype)];
  const int64_t element_bytes = static_cast<int64_t>(dtype_size(args.layer.dtype));
  const bool together = s.channels % 64 == 0;  // pixels' words follow each other without a gap
  const int64_t pieces = together ? 1 : s.width;
  const int64_t piece = together ? s.width * s.channels : s.channels;
  const int64_t grain = kValuesWorthAThread / (s.width * s.channels + 1) + 1;
  parallel_range(parallel_for, count * windows.lines(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t line = i % windows.lines();
      char* at = to + i * windows.line_bytes;
      std::memset(at, 0, static_cast<size_t>(windows.line_bytes));
      if (windows.is_padding(line)) continue;
      const int64_t y = (first + i / windows.lines()) * s.height + line - s.padding_height;
      const char* x = static_cast<const char*>(args.layer.x) + y * s.width * s.channels * element_bytes;
      uint64_t* bits = reinterpret_cast<uint64_t*>(at + s.padding_width * windows.pixel_bytes);
      for (int64_t p = 0; p < pieces; ++p) {
        pack_row(x + p * piece * element_bytes, piece, bits + p * binary_words(piece));
      }
    }
  });
}

// What each class subtracts: corrections [1 + classes][n], of which row 0 is used on the way.
Status find_corrections(const BinaryCall& of, const Classes& classes, int64_t words, int32_t* corrections,
                        const ParallelFor& parallel_for) {
  BinaryCall call = of;
  call.m = 1 + classes.count();
  call.result = Result::kInt32;
  call.y = corrections;
  const Status status = run_binary_tiles(call, {}, parallel_for, [&](int64_t row, int rows, const PreparedRows& to) {
    for (int r = 0; r < rows; ++r) {
      char* steps = to.rows + r * to.stride;
      classes.write(row + r - 1, words, call.bits_of(steps));
      call.kernels->spread(call.bits_of(steps), call.words, steps);
    }
  });
  for (int64_t c = 1; status.ok() && c < call.m; ++c) {
    int32_t* row = corrections + c * call.n;
    for (int64_t i = 0; i < call.n; ++i) row[i] = (corrections[i] - row[i]) / 2;
  }
  return status;
}

}  // namespace

Status binary_conv2d(const BinaryConv2d& args, const ParallelFor& parallel_for) {
  const Conv2dShape& s = args.shape;
  const BinaryKernels* kernels = nullptr;
  Windows windows;
  const int64_t words = binary_words(s.channels);
  Status status = binary_kernels(&kernels);
  if (status.ok()) status = windows.set(s, words * static_cast<int64_t>(sizeof(uint64_t)), 0);
  if (status.ok()) status = check(args, windows);
  if (!status.ok() || s.images == 0 || args.layer.n == 0) return status;

  const int64_t taps = s.kernel_height * s.kernel_width;
  const BinaryEpilogue epilogue = {static_cast<int32_t>(taps * s.channels), args.layer.weight_scale, args.layer.bias,
                                   nullptr};
  BinaryCall call = {
      kernels, args.layer.weight_bits, 0, args.layer.n, taps * words, epilogue, static_cast<Result>(args.layer.dtype),
      nullptr};
  const int64_t at_once = windows.images_at_once();
  const int64_t images_bytes = at_once * windows.image_bytes();
  Scratch scratch(static_cast<size_t>(images_bytes + Classes::bytes(windows) + 64));
  if (scratch.data() == nullptr) return Status::internal("out of memory for the signs of images");
  const Classes classes(windows, scratch.data() + images_bytes);
  Scratch table(static_cast<size_t>((1 + classes.count()) * call.n) * sizeof(int32_t));
  if (table.data() == nullptr) return Status::internal("out of memory for the corrections of padding");
  int32_t* corrections = reinterpret_cast<int32_t*>(table.data());
  const bool is_padded = s.padding_height + s.padding_width > 0;
  if (is_padded) status = find_corrections(call, classes, words, corrections, parallel_for);

  for (int64_t first = 0; status.ok() && first < s.images; first += at_once) {
    const int64_t count = std::min(at_once, s.images - first);
    pack_images(args, *kernels, windows, first, count, scratch.data(), parallel_for);
    call.m = count * windows.outputs();
    call.y = static_cast<char*>(args.layer.y) + first * windows.outputs() * call.n * result_bytes(call.result);
    status = run_binary_tiles(
        call, {}, parallel_for,
        [&](int64_t row, int rows, const PreparedRows& to) {
          windows.for_each(scratch.data(), row, rows, [&](int64_t r, const Windows::At& at) {
            char* steps = to.rows + r * to.stride;
            windows.copy(at.window, reinterpret_cast<char*>(call.bits_of(steps)));
            kernels->spread(call.bits_of(steps), call.words, steps);
          });
        },
        [&](int64_t row, int rows, const int32_t** to) {
          bool any = false;
          if (!is_padded) return any;
          windows.for_each(nullptr, row, rows, [&](int64_t r, const Windows::At& at) {
            const int64_t index = classes.of(at.row, at.column);
            to[r] = classes.is_complete(index) ? nullptr : corrections + (1 + index) * call.n;
            any = any || to[r] != nullptr;
          });
          return any;
        });
  }
  return status;
}

}  // namespace kdq
