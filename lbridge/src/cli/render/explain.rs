//! `explain`: prints the steps of a connection.

use std::fmt::Write as _;

use super::{print, shown};
use crate::{
    cli::Failure,
    planning::explain::{Answer, Explanation, Stage, Step},
};

/// Prints the steps of a connection.
pub(in crate::cli) fn explanation(explanation: &Explanation) -> Result<(), Failure> {
    let mut text = String::new();
    let steps = |text: &mut String, steps: &[Step]| {
        for step in steps {
            let mark = match step.verdict {
                Answer::Yes => '+',
                Answer::No => '-',
                Answer::Note => ' ',
            };
            let stage = match step.stage {
                Stage::Network => "network",
                Stage::Rule => "rule",
                Stage::Localhost => "localhost",
                Stage::Arrival => "arrival",
                Stage::Firewall => "firewall",
                Stage::Lookup => "lookup",
                Stage::Source => "source",
                Stage::Listener => "listener",
                Stage::Relay => "relay",
                Stage::Host => "host",
                Stage::Peer => "peer",
            };
            let _ = writeln!(text, "{mark} {stage:9} {}", shown(&step.text));
            for detail in &step.details {
                let _ = writeln!(text, "{:14}{}", "", shown(detail));
            }
        }
    };
    steps(&mut text, &explanation.steps);
    for way in &explanation.ways {
        let _ = writeln!(text, "\n{} dials {}", way.source, way.dialled);
        steps(&mut text, &way.steps);
    }
    let _ = writeln!(text, "\n{}; {}", shown(&explanation.outcome), shown(&explanation.remedy));
    print(&text)
}
