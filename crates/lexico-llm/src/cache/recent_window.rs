use ::lexico::attention::{DenseRows, NumberType};

/// Newest keys, or values, of a KV head, dense in f16, as several methods keep them; those of `lexico` are in the codec's
/// `LayerCache`.
pub(super) struct RecentWindow {
    pub(super) rows: DenseRows,
    /// Max number of vectors kept.
    pub(super) max: usize,
}

impl RecentWindow {
    pub(super) fn new(head_dim: usize, max: usize) -> Self {
        Self {
            rows: DenseRows::new(head_dim, NumberType::F16),
            max,
        }
    }

    /// Takes vectors `[n, m]` and returns those that it cannot keep, the oldest.
    pub(super) fn take(&mut self, new: &[f32]) -> Vec<f32> {
        let (held, m) = (self.rows.len(), self.rows.head_dim());
        let leaving = (held + new.len() / m).saturating_sub(self.max);
        let from_held = leaving.min(held);
        let from_new = (leaving - from_held) * m;
        let mut out = Vec::new();
        self.rows.read(0, from_held, &mut out);
        out.extend_from_slice(&new[..from_new]);
        self.rows.drop_front(from_held);
        self.rows.extend(&new[from_new..]);
        out
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_oldest_leave_in_order(m in 1usize..5, max in 0usize..9, steps in vec(0usize..20, 1..9)) {
            let mut window = RecentWindow::new(m, max);
            let (mut given, mut left) = (Vec::new(), Vec::new());
            for t in steps {
                let new: Vec<f32> = (given.len()..given.len() + t * m).map(|i| i as f32).collect();
                given.extend_from_slice(&new);
                left.extend(window.take(&new));
                prop_assert_eq!(window.rows.len(), max.min(given.len() / m));
                let all = [left.clone(), window.rows.to_f32()].concat();
                prop_assert_eq!(&all, &given);
            }
        }
    }
}
