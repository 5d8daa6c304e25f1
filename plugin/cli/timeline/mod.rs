//! `xl vne-snapshot show --timeline`: what happened to each member when, on one
//! axis, for the terminal (`text.rs`) or a browser (`svg.rs`).

mod svg;
mod text;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::{print, Failure};
use crate::image::{Manifest, Member, Timeline, ROUNDS_MAX};
use crate::sidecar::files;

/// Where it's drawn.
#[derive(Debug, Clone)]
pub enum Canvas {
    /// On the terminal.
    Terminal,
    /// Into a page that is all in one file.
    Html(PathBuf),
    /// Into a picture.
    Svg(PathBuf),
}

/// What the option is without a value.
pub const TERMINAL: &str = "-";

impl FromStr for Canvas {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let path = PathBuf::from(text);
        match path.extension().and_then(OsStr::to_str) {
            _ if text == TERMINAL => Ok(Self::Terminal),
            Some("html") => Ok(Self::Html(path)),
            Some("svg") => Ok(Self::Svg(path)),
            _ => Err("the file's name has to end in .html or .svg"),
        }
    }
}

/// Draws a snapshot's take.
pub fn draw(manifest: &Manifest, canvas: &Canvas) -> Result<(), Failure> {
    let drawing = Drawing::of(manifest).ok_or_else(|| {
        format!(
            "{}@{} was taken by a version of xl-vne that kept no times of its rounds",
            manifest.vne, manifest.id
        )
    })?;
    match canvas {
        Canvas::Terminal => print(&text::draw(&drawing, text::width())),
        Canvas::Html(path) => write(path, &svg::page(&drawing)),
        Canvas::Svg(path) => write(path, &svg::picture(&drawing)),
    }
}

fn write(path: &Path, text: &str) -> Result<(), Failure> {
    Ok(files::replace(path, text.as_bytes())
        .map_err(|error| format!("{}: {error}", path.display()))?)
}

/// What something was spent on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A round of pre-copy.
    Round,
    /// Pre-copy has converged and goes on until the cut.
    Hover,
    /// Frames are held.
    Held,
    /// From the suspend request to the guest's standing still.
    Suspend,
    /// Last pages.
    Pages,
    /// Processors' and devices' state.
    State,
    /// Setting the guest running.
    Resume,
    /// Writing out what was kept in memory, while the guest runs.
    Finalise,
}

impl Kind {
    const ALL: [Self; 8] = [
        Self::Round,
        Self::Hover,
        Self::Held,
        Self::Suspend,
        Self::Pages,
        Self::State,
        Self::Resume,
        Self::Finalise,
    ];

    /// For legends.
    fn words(self) -> &'static str {
        match self {
            Self::Round => "copying (each round)",
            Self::Hover => "hovering",
            Self::Held => "its frames are held",
            Self::Suspend => "suspending",
            Self::Pages => "last pages",
            Self::State => "device state",
            Self::Resume => "resuming",
            Self::Finalise => "writing out, guest runs",
        }
    }

    /// For colours, as a class.
    fn name(self) -> &'static str {
        match self {
            Self::Round => "round",
            Self::Hover => "hover",
            Self::Held => "held",
            Self::Suspend => "suspend",
            Self::Pages => "pages",
            Self::State => "state",
            Self::Resume => "resume",
            Self::Finalise => "finalise",
        }
    }
}

/// A stretch of time, in ns from the first member's cut.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Span {
    kind: Kind,
    from_ns: f64,
    to_ns: f64,
}

impl Span {
    fn length_ns(&self) -> f64 {
        self.to_ns - self.from_ns
    }
}

/// A round as it's plotted.
#[derive(Debug, Clone, Copy)]
struct Plotted {
    from_ns: f64,
    to_ns: f64,
    /// Pages of one round, on average where there are several.
    pages: u64,
    /// How many rounds.
    count: u32,
}

/// A member.
struct Lane {
    name: String,
    /// When it was cut.
    cut_ns: f64,
    /// All but the holding of frames, in order; spans of 0 are left out.
    spans: Vec<Span>,
    held: Span,
    rounds: Vec<Plotted>,
    /// Pages that were left at the cut.
    final_pages: u64,
    downtime_ns: u64,
}

/// All that is drawn.
struct Drawing {
    title: String,
    subtitle: String,
    lanes: Vec<Lane>,
    /// From the first member's first round to the last one's last byte.
    whole: (f64, f64),
    /// Around the cut: from the first hold to when all run and frames go.
    cut: (f64, f64),
}

impl Drawing {
    /// None if no member has times. Some may have none: each host's version of
    /// xl-vne writes its own members'.
    fn of(manifest: &Manifest) -> Option<Self> {
        let several = manifest.hosts.len() > 1;
        let members = manifest.members.iter().zip(&manifest.cut.at_ns);
        let lanes: Vec<Lane> = members
            .filter_map(|(member, cut_ns)| {
                let times = member.timeline.as_ref()?;
                Some(Lane::of(member, times, *cut_ns as f64, several))
            })
            .collect();
        let spans = || lanes.iter().flat_map(|lane| &lane.spans);
        let whole = extent(spans().chain(lanes.iter().map(|lane| &lane.held)))?;
        let near = spans().filter(|span| {
            let far = [Kind::Round, Kind::Hover, Kind::Finalise];
            !far.contains(&span.kind)
        });
        let (from, to) = extent(near.chain(lanes.iter().map(|lane| &lane.held)))?;
        // Room for seeing what comes before and after.
        let margin = ((to - from) * 0.08).max(1e6);
        let hosts: Vec<&str> = manifest.hosts.iter().map(|host| host.as_str()).collect();
        let label = manifest.label.as_ref().map(|label| format!(", '{label}'"));
        Some(Self {
            title: format!("{}@{}", manifest.vne, manifest.id),
            subtitle: format!(
                "{} on {}, Xen {}{}",
                manifest.created,
                hosts.join(", "),
                manifest.xen_version,
                label.unwrap_or_default()
            ),
            whole,
            cut: (from - margin, to + margin),
            lanes,
        })
    }
}

fn extent<'a>(spans: impl Iterator<Item = &'a Span>) -> Option<(f64, f64)> {
    let both = |so_far: Option<(f64, f64)>, span: &Span| {
        let (from, to) = so_far.unwrap_or((span.from_ns, span.to_ns));
        Some((from.min(span.from_ns), to.max(span.to_ns)))
    };
    // Where all happened at once there would be nothing to divide by.
    spans
        .fold(None, both)
        .map(|(from, to)| (from, to.max(from + 1.0)))
}

impl Lane {
    fn of(member: &Member, times: &Timeline, cut_ns: f64, several: bool) -> Self {
        let before = |ns: u64| cut_ns - ns as f64;
        let rounds: Vec<Plotted> = times
            .rounds
            .iter()
            .take(ROUNDS_MAX)
            .map(|round| Plotted {
                from_ns: before(round.before_ns),
                to_ns: before(round.before_ns) + round.duration_ns as f64,
                pages: round.pages_each(),
                count: round.count,
            })
            .collect();
        let downtime = &member.downtime;
        let asked_ns = before(downtime.suspend_ns);
        let hover_ns = times.hover_ns.map_or(asked_ns, before).min(asked_ns);
        let mut spans: Vec<Span> = rounds
            .iter()
            .take_while(|round| round.from_ns < hover_ns)
            .map(|round| Span {
                kind: Kind::Round,
                from_ns: round.from_ns,
                to_ns: round.to_ns.min(hover_ns),
            })
            .collect();
        let mut at_ns = hover_ns;
        let phases = [
            (Kind::Hover, asked_ns - hover_ns),
            (Kind::Suspend, downtime.suspend_ns as f64),
            (Kind::Pages, downtime.last_pages_ns as f64),
            (
                Kind::State,
                downtime.device_state_ns.saturating_add(downtime.disks_ns) as f64,
            ),
            (Kind::Resume, downtime.resume_ns as f64),
        ];
        for (kind, length_ns) in phases {
            spans.push(Span {
                kind,
                from_ns: at_ns,
                to_ns: at_ns + length_ns,
            });
            at_ns += length_ns;
        }
        spans.push(Span {
            kind: Kind::Finalise,
            from_ns: cut_ns + times.finalise_ns as f64,
            to_ns: cut_ns + times.stored_ns.max(times.finalise_ns) as f64,
        });
        spans.retain(|span| span.length_ns() > 0.0);
        Self {
            name: match several {
                true => format!("{}:{}", member.host, member.name),
                false => member.name.to_string(),
            },
            cut_ns,
            spans,
            held: Span {
                kind: Kind::Held,
                from_ns: before(times.held_ns),
                to_ns: cut_ns + times.released_ns as f64,
            },
            rounds,
            final_pages: member.pages_final_dirty,
            downtime_ns: downtime.total_ns(),
        }
    }
}

/// A length of time as people read it, with as many digits as matter.
fn time(ns: f64) -> String {
    let size = ns.abs();
    let (value, unit) = match size {
        _ if size >= 60e9 => (ns / 60e9, "min"),
        _ if size >= 1e9 => (ns / 1e9, "s"),
        _ if size >= 1e6 => (ns / 1e6, "ms"),
        _ => (ns / 1e3, "µs"),
    };
    if size == 0.0 {
        return String::from("0");
    }
    match value.abs() {
        size if size >= 100.0 || value.fract().abs() < 1e-9 => format!("{value:.0} {unit}"),
        size if size >= 10.0 => format!("{value:.1} {unit}"),
        _ => format!("{value:.2} {unit}"),
    }
}

/// Round numbers between two others, about as many as asked for.
fn ticks(from_ns: f64, to_ns: f64, about: usize) -> Vec<f64> {
    let raw = (to_ns - from_ns) / about.max(1) as f64;
    let ten = 10f64.powf(raw.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * ten);
    let step = steps.into_iter().find(|step| *step >= raw).unwrap_or(raw);
    let first = (from_ns / step).ceil();
    (0..=about * 2 + 2)
        // Without the sum, so that 0 is 0.
        .map(|number| (first + number as f64) * step)
        .take_while(|at| *at <= to_ns)
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(super) mod tests;
