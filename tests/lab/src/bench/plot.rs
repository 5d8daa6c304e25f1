//! Plots that any browser opens, without anything else: bars with the extremes.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};

use super::figures::{short, Book, Figure};

/// A plot, and what is in it.
struct Plot {
    file: &'static str,
    title: &'static str,
    part: &'static str,
    unit: &'static str,
    /// In the names of the figures that it shows; one of these.
    of: &'static [&'static str],
    logarithmic: bool,
}

const PLOTS: &[Plot] = &[
    Plot {
        file: "downtime.svg",
        title: "Downtime seen from outside, logarithmic",
        part: "downtime",
        unit: "ms",
        of: &[
            ": floor\n",
            ": xl save -c\n",
            ": stock live policy\n",
            ": ours\n",
        ],
        logarithmic: true,
    },
    Plot {
        file: "phases.svg",
        title: "Where ours goes, 512 MiB and 2,000 pages/s",
        part: "downtime",
        unit: "ms",
        of: &[
            "512 MiB, 2000 pages/s: floor",
            "512 MiB, 2000 pages/s: ours",
        ],
        logarithmic: false,
    },
    Plot {
        file: "guest.svg",
        title: "What a guest loses meanwhile, as a part of its work",
        part: "guest",
        unit: "",
        of: &["lost to"],
        logarithmic: false,
    },
    Plot {
        file: "restore.svg",
        title: "Restore",
        part: "restore",
        unit: "s",
        of: &["members"],
        logarithmic: false,
    },
    Plot {
        file: "hosts.svg",
        title: "Two hosts",
        part: "hosts",
        unit: "ms",
        of: &["members"],
        logarithmic: false,
    },
    Plot {
        file: "protocol.svg",
        title: "From the first hold to the last release, simulated",
        part: "protocol",
        unit: "s",
        of: &["cut"],
        logarithmic: false,
    },
    Plot {
        file: "stream.svg",
        title: "The stream into the store, a GiB",
        part: "stream",
        unit: "s",
        of: &["time a GiB"],
        logarithmic: false,
    },
];

const WIDTH: f64 = 900.0;
const LABELS: f64 = 420.0;
const ROW: f64 = 26.0;
const TOP: f64 = 48.0;
/// Right of the bars: the number.
const NUMBERS: f64 = 90.0;

/// Writes the plots for which there is something into a folder.
pub fn write(book: &Book, folder: &Path) -> Result<usize> {
    std::fs::create_dir_all(folder)
        .with_context(|| format!("cannot create {}", folder.display()))?;
    let mut count = 0;
    for plot in PLOTS {
        let figures: Vec<&Figure> = book
            .of(plot.part)
            .filter(|figure| figure.unit == plot.unit && plot.shows(&figure.name))
            .collect();
        if figures.is_empty() {
            continue;
        }
        let path = folder.join(plot.file);
        std::fs::write(&path, plot.svg(&figures))
            .with_context(|| format!("cannot write {}", path.display()))?;
        count += 1;
    }
    Ok(count)
}

impl Plot {
    /// A line break stands for a name's end.
    fn shows(&self, name: &str) -> bool {
        let name = format!("{name}\n");
        self.of.iter().any(|part| name.contains(part))
    }

    fn svg(&self, figures: &[&Figure]) -> String {
        let most = figures.iter().map(|figure| figure.most());
        let most = most.fold(f64::MIN_POSITIVE, f64::max);
        let least = figures.iter().map(|figure| figure.least());
        let floor = least.fold(most, f64::min).max(most / 1e6) / 2.0;
        let scale = |value: f64| {
            let share = match self.logarithmic {
                true => (value.max(floor) / floor).ln() / (most / floor).ln(),
                false => value.max(0.0) / most,
            };
            share * (WIDTH - LABELS - NUMBERS)
        };
        let height = TOP + ROW * figures.len() as f64 + 12.0;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
             font-family=\"sans-serif\" font-size=\"13\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
             <text x=\"12\" y=\"26\" font-size=\"17\">{}</text>\n",
            escape(self.title)
        );
        for (row, figure) in figures.iter().enumerate() {
            let y = TOP + ROW * row as f64;
            let middle = y + ROW / 2.0;
            let end = scale(figure.median());
            let (from, to) = (
                LABELS + scale(figure.least()),
                LABELS + scale(figure.most()),
            );
            let _ = write!(
                svg,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\n\
                 <rect x=\"{LABELS}\" y=\"{:.1}\" width=\"{end:.1}\" height=\"{:.1}\" \
                 fill=\"#4878a8\"/>\n\
                 <path d=\"M{from:.1} {middle:.1}H{to:.1}M{from:.1} {:.1}v8M{to:.1} {:.1}v8\" \
                 stroke=\"#222\"/>\n\
                 <text x=\"{:.1}\" y=\"{:.1}\">{} {}</text>\n",
                LABELS - 10.0,
                middle + 4.5,
                escape(&figure.name),
                y + 4.0,
                ROW - 8.0,
                middle - 4.0,
                middle - 4.0,
                to.max(LABELS + end) + 8.0,
                middle + 4.5,
                short(figure.median()),
                escape(&figure.unit),
            );
        }
        svg.push_str("</svg>\n");
        svg
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn figure(name: &str, values: &[f64]) -> Figure {
        Figure {
            part: String::new(),
            name: name.to_owned(),
            unit: String::from("ms"),
            values: values.to_vec(),
        }
    }

    #[test]
    fn a_plot_shows_what_it_names_and_nothing_longer() {
        let plot = PLOTS.iter().find(|plot| plot.file == "downtime.svg");
        let shows = |name: &str| plot.is_some_and(|plot| plot.shows(name));
        assert!(shows("512 MiB, 2000 pages/s: ours"));
        assert!(!shows("512 MiB, 2000 pages/s: ours, suspend"));
        assert!(shows("512 MiB, 2000 pages/s: xl save -c"));
    }

    #[test]
    fn the_longest_bar_ends_where_the_numbers_begin_and_text_is_escaped() {
        for plot in PLOTS {
            let svg = plot.svg(&[&figure("a < b", &[200.0]), &figure("c", &[1.0, 2.0, 4.0])]);
            let width = WIDTH - LABELS - NUMBERS;
            assert!(svg.contains(&format!("width=\"{width:.1}\"")), "{svg}");
            assert!(svg.contains("a &lt; b") && svg.ends_with("</svg>\n"));
        }
    }
}
