//! What the product aims at, under the names that scripts know.

/// How large a value may or must be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bound {
    /// This or less.
    AtMost(f64),
    /// This or more.
    AtLeast(f64),
}

/// One aim.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name in the JSON's `targets`. Never changes.
    pub name: &'static str,
    /// What it should be.
    bound: Bound,
}

impl Target {
    /// Whether a value is what it should be.
    pub fn met(&self, value: f64) -> bool {
        match self.bound {
            Bound::AtMost(bound) => value <= bound,
            Bound::AtLeast(bound) => value >= bound,
        }
    }

    /// For people.
    pub fn bound(&self) -> String {
        match self.bound {
            Bound::AtMost(bound) => format!("<= {bound}"),
            Bound::AtLeast(bound) => format!(">= {bound}"),
        }
    }
}

const fn at_most(name: &'static str, bound: f64) -> Target {
    Target {
        name,
        bound: Bound::AtMost(bound),
    }
}

/// All of them; what each is, is told in `plugin/docs/benchmarks.md`.
pub const TARGETS: [Target; 13] = [
    at_most("downtime_over_floor", 1.5),
    Target {
        name: "xl_save_over_downtime",
        bound: Bound::AtLeast(20.0),
    },
    at_most("downtime_growth_128_1024", 1.15),
    at_most("busy_downtime_over_floor", 3.0),
    at_most("skew_over_downtime", 0.25),
    at_most("frames_dropped", 0.0),
    at_most("tcp_retransmits_caused", 0.0),
    at_most("hover_slowdown_cpu", 0.03),
    at_most("hover_slowdown_memory", 0.10),
    at_most("second_bytes_over_first", 0.08),
    at_most("second_time_over_first", 0.25),
    at_most("restore8_over_stock_sum", 0.6),
    at_most("cut_10000_members_s", 1.0),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_a_name_of_its_own_and_stands_in_the_document() {
        let page = include_str!("../../../../plugin/docs/benchmarks.md");
        let mut names: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
        for name in &names {
            assert!(page.contains(&format!("`{name}`")), "{name}");
        }
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), TARGETS.len());
    }

    #[test]
    fn bounds_are_met_from_the_right_side() {
        let target = |name: &str| TARGETS.iter().find(|target| target.name == name);
        let met = |name: &str, value| target(name).is_some_and(|target| target.met(value));
        assert!(met("downtime_over_floor", 1.5) && !met("downtime_over_floor", 1.51));
        assert!(met("xl_save_over_downtime", 20.0) && !met("xl_save_over_downtime", 19.9));
        assert!(met("frames_dropped", 0.0) && !met("frames_dropped", 1.0));
    }
}
