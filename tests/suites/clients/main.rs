//! Clients and servers that people use, over the relay: what they said must arrive, and how they ended must
//! show.
//!
//! Every test has a container dial the gateway, and a service on the host's 127.0.0.1 behind a rule, most of
//! them with `--path relay`.

mod bytes;
mod crowd;
mod dns;
mod exhaustion;
mod http;
mod node;
mod postgres;
mod pressure;
mod redis;
mod relayed;
mod scripts;
mod streams;
mod vanish;

use lbridge_tests::harness::suite::Suite;

fn main() {
    crowd::hook();
    let tests = [
        postgres::tests(),
        redis::tests(),
        dns::tests(),
        http::tests(),
        node::tests(),
        streams::tests(),
        pressure::tests(),
        crowd::tests(),
        scripts::tests(),
        vanish::tests(),
        exhaustion::tests(),
    ];
    Suite::new(&[], tests.concat()).main()
}
