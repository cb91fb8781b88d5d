#include "perceptron.h"
#include "perceptron_kernel.h"

namespace sam_fast {
const PerceptronKernels kPerceptronAvx2 = {linear, finish};
}
