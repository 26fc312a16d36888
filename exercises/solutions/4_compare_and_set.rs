//! Both look before either takes. If replicas compared, each saying yes to the first that comes,
//! two of three could not say yes to both; but one yes for each, and nobody has it, while a get
//! may show either. To decide even then takes rounds of promises: consensus.

use super::{ALICE, BOB, Cas, ERIN, Tea};

pub fn schedule(tea: &mut Tea, mine: &mut Cas, yours: &mut Cas) {
    mine.get(tea, [ERIN, ALICE]);
    yours.get(tea, [ALICE, BOB]);
    mine.set(tea, [ERIN, ALICE]);
    yours.set(tea, [ALICE, BOB]);
}
