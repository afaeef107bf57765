use ::lexico::attention::{DenseRows, NumberType};

/// The newest keys, or values, of a KV head, dense in f16.
pub(super) struct Window {
    rows: DenseRows,
    head_dim: usize,
    /// Most vectors that it keeps.
    most: usize,
}

impl Window {
    pub(super) fn new(head_dim: usize, most: usize) -> Self {
        Self {
            rows: DenseRows::new(head_dim, NumberType::F16),
            head_dim,
            most,
        }
    }

    pub(super) fn rows(&self) -> &DenseRows {
        &self.rows
    }

    /// Takes vectors `[n, m]` and returns those that it cannot keep, the oldest.
    pub(super) fn take(&mut self, new: &[f32]) -> Vec<f32> {
        let held = self.rows.len();
        let leaving = (held + new.len() / self.head_dim).saturating_sub(self.most);
        let from_held = leaving.min(held);
        let from_new = (leaving - from_held) * self.head_dim;
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
        fn the_oldest_leave_in_order(m in 1usize..5, most in 0usize..9, steps in vec(0usize..20, 1..9)) {
            let mut window = Window::new(m, most);
            let (mut given, mut left) = (Vec::new(), Vec::new());
            for t in steps {
                let new: Vec<f32> = (given.len()..given.len() + t * m).map(|i| i as f32).collect();
                given.extend_from_slice(&new);
                left.extend(window.take(&new));
                prop_assert_eq!(window.rows().len(), most.min(given.len() / m));
                let all = [left.clone(), window.rows().to_f32()].concat();
                prop_assert_eq!(&all, &given);
            }
        }
    }
}
