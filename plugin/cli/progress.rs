//! Showing a take while it works: a block that is redrawn on a terminal, a
//! line per phase elsewhere.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use super::units::ms;
use crate::cut::Phase;
use crate::image::Name;
use crate::sidecar::lead::{MemberName, Progress, Told};

const REDRAW_INTERVAL: Duration = Duration::from_millis(100);

/// Prints to stderr, so that stdout is the result's alone.
pub struct Printer {
    members: Vec<MemberLine>,
    phase: Phase,
    quiet: bool,
    terminal: bool,
    drawn_lines: usize,
    drawn_at: Option<Instant>,
}

struct MemberLine {
    name: String,
    text: String,
}

impl Printer {
    /// For these members; `here` is the host that needn't be named.
    pub fn new(members: &[MemberName], here: &Name, quiet: bool) -> Self {
        let alone = members.iter().all(|member| member.host == *here);
        let line = |member: &MemberName| MemberLine {
            name: match alone {
                true => member.name.to_string(),
                false => format!("{}:{}", member.host, member.name),
            },
            text: String::from("-"),
        };
        Self {
            members: members.iter().map(line).collect(),
            phase: Phase::Prepare,
            quiet,
            terminal: std::io::stderr().is_terminal(),
            drawn_lines: 0,
            drawn_at: None,
        }
    }

    fn say(&mut self, index: usize, text: String, always: bool) {
        if let Some(line) = self.members.get_mut(index) {
            line.text = text;
        }
        if always && !self.terminal {
            if let Some(line) = self.members.get(index) {
                self.write(&format!("  {}: {}\n", line.name, line.text));
            }
        }
        self.draw(always);
    }

    fn draw(&mut self, always: bool) {
        let soon = self
            .drawn_at
            .is_some_and(|at| at.elapsed() < REDRAW_INTERVAL);
        if !self.terminal || self.quiet || (soon && !always) {
            return;
        }
        let mut text = String::new();
        if self.drawn_lines > 0 {
            // Up to the block's first line; each line then clears its rest.
            text.push_str(&format!("\x1b[{}A", self.drawn_lines));
        }
        text.push_str(&format!("{}\x1b[K\n", self.phase));
        for line in &self.members {
            text.push_str(&format!("  {:<20} {}\x1b[K\n", line.name, line.text));
        }
        self.drawn_lines = self.members.len() + 1;
        self.drawn_at = Some(Instant::now());
        self.write(&text);
    }

    fn write(&self, text: &str) {
        if !self.quiet {
            // Progress that can't be shown must not fail a snapshot.
            let _ = std::io::stderr().write_all(text.as_bytes());
        }
    }
}

impl Progress for Printer {
    fn tell(&mut self, told: Told) {
        match told {
            Told::Phase(phase) => {
                self.phase = phase;
                if !self.terminal {
                    self.write(&format!("{phase}\n"));
                }
                self.draw(true);
            }
            Told::Round {
                member,
                round,
                converged,
            } => {
                let state = if converged { "hovering" } else { "copying" };
                let text = format!(
                    "{state}: round {}, {} pages in {}",
                    round.iteration,
                    round.pages,
                    ms(round.duration_ns)
                );
                // Off a terminal only the first round is worth a line.
                self.say(member, text, round.iteration == 0);
            }
            Told::Cut {
                member,
                downtime_ns,
            } => self.say(member, format!("cut, down for {}", ms(downtime_ns)), true),
            Told::Throttled { member, cap } => {
                let text = format!("doesn't converge: throttled to {cap}% of a processor");
                self.say(member, text, true);
            }
            Told::Stored { member } => self.say(member, String::from("stored"), true),
        }
    }
}
