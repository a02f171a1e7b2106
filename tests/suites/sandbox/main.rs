//! `lbridge relay`, run by a user without privileges around sandboxes of that user: real bubblewrap, real
//! unshare(1).

mod bridge;
mod launch;
mod scene;

use std::{env, process};

use lbridge_tests::harness::suite::{Need, Suite};

fn main() {
    const NEEDS: &[Need] = &[
        Need::Program("bwrap"),
        Need::Program("unshare"),
        Need::Program("setpriv"),
        Need::Program("busybox"),
    ];
    if env::var_os(launch::ROLE).is_some() {
        process::exit(launch::connect());
    }
    Suite::new(NEEDS, [launch::tests(), bridge::tests()].concat()).main()
}
