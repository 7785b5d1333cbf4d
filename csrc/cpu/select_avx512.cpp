#include "select_row.h"

namespace opd::cpu {

const RowSelectors kAvx512Selectors = {select_row<Float32>, select_row<Float16>,
                                       select_row<BFloat16>};

}  // namespace opd::cpu
